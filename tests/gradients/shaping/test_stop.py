"""Stopping: in places, in windows of steps, and in the carry of a scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


def let_through(layer, step):
    """1 where a gradient passes, 0 where it is stopped."""
    return jax.grad(lambda x: jnp.sum(layer(x, step)))(jnp.ones(jnp.shape(step)))


@pytest.mark.smoke
def test_in_places():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    g = np.float32([[np.inf, np.nan, 3], [4, np.nan, np.inf]])
    where = np.array([[True, True, False], [False, False, True]])
    dtypes = (jnp.float32, jnp.bfloat16, jnp.float16)

    @jax.jit
    def values_and_gradients(x, g, where):
        found = []
        for dtype in dtypes:
            y, pull = jax.vjp(lambda x: fcg.stop_gradient(x, where), x.astype(dtype))
            found.append((y, *pull(g.astype(dtype))))
        return found

    for dtype, (y, dx) in zip(dtypes, values_and_gradients(x, g, where), strict=True):
        assert y.dtype == dx.dtype == dtype
        np.testing.assert_array_equal(np.asarray(y, np.float32), x)
        np.testing.assert_array_equal(np.asarray(dx, np.float32), [[0, 0, 3], [4, np.nan, 0]])


def test_everywhere_or_nowhere():
    x = jnp.ones(3)
    gradient = jax.grad(lambda x, where=True: jnp.sum(fcg.stop_gradient(x, where)))
    for all_of, none_of in [(True, False), (np.True_, np.False_)]:
        np.testing.assert_array_equal(gradient(x, all_of), 0)
        np.testing.assert_array_equal(gradient(x, none_of), 1)
    np.testing.assert_array_equal(jax.jit(gradient)(x, True), 0)
    np.testing.assert_array_equal(gradient(x), 0)
    assert fcg.stop_gradient(jnp.arange(3), jnp.array(True)).dtype == jnp.int32
    complex_gradient = jax.vjp(lambda x: fcg.stop_gradient(x, x.real > 0), jnp.array([1j, 1]))[1]
    np.testing.assert_array_equal(complex_gradient(jnp.array([1j, 1j]))[0], [1j, 0])


@pytest.mark.parametrize(
    ("layer", "stopped"),
    [
        (fcg.StopGradient(), range(12)),
        (fcg.StopGradient(stop=5), range(5)),
        (fcg.StopGradient(start=5), range(5, 12)),
        (fcg.StopGradient(2, 9), range(2, 9)),
        (fcg.StopGradient(every=4), range(0, 12, 4)),
        (fcg.StopGradient(3, 10, 3), range(3, 10, 3)),
        (fcg.StopGradient(start=-2, every=3), range(1, 12, 3)),
    ],
    ids=str,
)
def test_windows(layer, stopped):
    expected = [step not in stopped for step in range(12)]
    assert [not layer.stops_at(step) for step in range(12)] == expected
    for step in (0, 5, 11):
        assert let_through(layer, step) == expected[step]
    traced = jax.jit(lambda *steps: [let_through(layer, step) for step in steps])
    steps = [np.arange(12, dtype=dtype) for dtype in (np.int32, np.uint32, np.int8)]
    for found in traced(*steps):
        np.testing.assert_array_equal(found, expected)


def test_a_count_of_an_optimizer():
    step = nnx.Variable(jnp.uint32(3))
    assert let_through(fcg.StopGradient(stop=3), step) == 1
    assert let_through(fcg.StopGradient(stop=4), step) == 0


def test_truncated_backpropagation_through_time():
    """The gradient of each window is that of the window alone, its first state a constant."""
    k, x = 5, jax.random.normal(jax.random.key(0), (20, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3))
    window = fcg.StopGradient(every=k)

    def states(w, h, x, steps, stop):
        def body(h, inputs):
            step, x = inputs
            h = jnp.tanh((window(h, step) if stop else h) @ w + x)
            return h, h

        return jax.lax.scan(body, h, (steps, x))[1]

    def loss(w):
        return jnp.sum(states(w, jnp.zeros(3), x, jnp.arange(20), True) ** 2)

    @jax.jit
    def of_the_windows(w):
        all_states = states(w, jnp.zeros(3), x, jnp.arange(20), False)
        firsts = jnp.concatenate([jnp.zeros((1, 3)), all_states[k - 1 : -1 : k]])

        def of_one(h, x):
            return jax.grad(lambda w: jnp.sum(states(w, h, x, jnp.arange(k), False) ** 2))(w)

        return jnp.sum(jax.vmap(of_one)(firsts, x.reshape(4, k, 3)), 0)

    found, expected = jax.jit(jax.grad(loss))(w), of_the_windows(w)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_bad_arguments():
    x = jnp.ones((2, 3))
    with pytest.raises(TypeError, match="stop_gradient: where is float32; write a boolean"):
        fcg.stop_gradient(x, jnp.ones(3))
    with pytest.raises(TypeError, match="stop_gradient: where is 1; write a boolean"):
        fcg.stop_gradient(x, 1)
    with pytest.raises(ValueError, match=r"where has shape \(2,\), which does not broadcast"):
        fcg.stop_gradient(x, jnp.array([True, False]))
    with pytest.raises(ValueError, match="stop=3 must be after start=3"):
        fcg.StopGradient(3, 3)
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        fcg.StopGradient(every=0)
    for name, bad in [("start", None), ("start", 1.0), ("stop", 2.5), ("every", True)]:
        with pytest.raises(TypeError, match=f"StopGradient: {name}={bad} must be an int"):
            fcg.StopGradient(**{name: bad})
    for bad in (0.5, jnp.ones(()), True):
        with pytest.raises(TypeError, match="must be an int or an array of integers"):
            fcg.StopGradient()(x, bad)
    with pytest.raises(ValueError, match="does not broadcast"):
        fcg.StopGradient()(x, jnp.arange(2))


def test_each_array_of_a_tree_and_integers_of_numpy():
    layer, tree = fcg.StopGradient(stop=np.int64(2)), {"a": jnp.ones(2), "b": jnp.ones(3)}
    for step, expected in ((np.int32(1), 0), (2, 1)):
        gradient = jax.grad(lambda t, step=step: sum(map(jnp.sum, layer(t, step).values())))(tree)
        for leaf in jax.tree.leaves(gradient):
            np.testing.assert_array_equal(leaf, np.full_like(leaf, expected))
