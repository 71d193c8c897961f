"""Clipping by value and by norm: at the limit, at extremes, and where nothing is finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import flax_customgrad as fcg


def clipped(g, x=None, **how):
    """What becomes of a cotangent."""
    x = jnp.ones_like(g) if x is None else x
    y, pull = jax.vjp(lambda x: fcg.gradient_clip(x, **how), x)
    np.testing.assert_array_equal(y, x)
    (dx,) = pull(g)
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    return dx


def test_by_value_in_float64():
    with jax.enable_x64(True):
        g = 3 * jax.random.normal(jax.random.key(0), (4, 3), jnp.float64)
        for limit in (0.7, jnp.array([0.1, 1.0, 10.0])):
            expected = np.clip(g, -np.asarray(limit), limit)
            np.testing.assert_allclose(clipped(g, max_value=limit), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_axes", [(), 0, (0, 1), -1, (0, -1), (0, 1, 2)], ids=str)
def test_by_norm_in_float64(batch_axes):
    with jax.enable_x64(True):
        g = jax.random.normal(jax.random.key(0), (4, 3, 2), jnp.float64)
        batch = np.atleast_1d(np.array(batch_axes, int)) % 3
        axes = tuple(i for i in range(3) if i not in batch)
        norm = np.sqrt((np.asarray(g) ** 2).sum(axes, keepdims=True))
        limit = float(np.median(norm)) * (1 if norm.size > 1 else 0.5)
        expected = np.asarray(g) * np.minimum(1, limit / norm)
        assert (expected != g).any()
        got = clipped(g, max_norm=limit, batch_axes=batch_axes)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=0)


def test_what_is_at_the_limit_passes_to_the_bit():
    g = jnp.array([3.0, -4.0])
    np.testing.assert_array_equal(clipped(g, max_norm=5.0), g)
    np.testing.assert_array_equal(clipped(g, max_value=4.0), g)
    np.testing.assert_array_equal(clipped(g, max_value=3.0), [3, -3])
    # jnp.clip has the derivative 1/2 there.
    second = jax.grad(
        lambda x: jnp.sum(jax.grad(lambda x: fcg.gradient_clip(x, max_value=2.0) ** 2)(x))
    )
    assert second(1.0) == 2


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__
)
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 6e4, 1e30, 3e38], ids=str)
def test_the_norm_neither_overflows_nor_vanishes(dtype, scale):
    scale = np.clip(scale, 1e-6, 6e4) if dtype == jnp.float16 else scale
    g = jnp.full((64,), scale, dtype).at[::2].multiply(-1)
    exact = np.asarray(g, np.float64)
    for limit in (1e-3, 1.0):
        expected = exact * min(1, limit / np.linalg.norm(exact))
        got = np.asarray(clipped(g, max_norm=limit), np.float64)
        np.testing.assert_allclose(got, expected, rtol=4 * float(jnp.finfo(dtype).eps))


def test_one_norm_of_few_and_many():
    g = jnp.full((1 << 16,), 1e20)
    np.testing.assert_allclose(clipped(g, max_norm=1.0), 1 / 256, rtol=1e-5)


@pytest.mark.parametrize(
    "how", [{"max_value": 1.0}, {"max_norm": 1.0}, {"max_norm": 1.0, "batch_axes": 0}]
)
def test_zeros_empty_arrays_and_integers(how):
    zeros = jnp.zeros((2, 3))
    np.testing.assert_array_equal(clipped(zeros, **how), zeros)
    assert clipped(jnp.zeros((2, 0)), **how).shape == (2, 0)
    assert clipped(jnp.zeros((0, 2)), **how).shape == (0, 2)
    x = jnp.arange(6).reshape(2, 3)
    assert fcg.gradient_clip(x, **how) is x

    def of_gradient(x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(fcg.gradient_clip(x, **how) ** 2))(x))

    assert np.isfinite(jax.grad(of_gradient)(zeros)).all()


def test_what_is_not_finite():
    g = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 3.0, 0.5])
    np.testing.assert_array_equal(clipped(g, max_value=1.0), [1, -1, np.nan, 1, 0.5])
    np.testing.assert_array_equal(clipped(g, max_norm=1.0), g)
    rows = jnp.array([[jnp.inf, 1.0], [jnp.nan, 5.0], [3.0, 4.0]])
    got = clipped(rows, max_norm=1.0, batch_axes=0)
    np.testing.assert_allclose(got, [[np.inf, 1], [np.nan, 5], [0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(clipped(rows[2:], max_norm=float("inf")), rows[2:])


def test_limits_traced_scheduled_and_batched():
    layer = fcg.GradientClip(max_norm=lambda step: 1.0 / step, batch_axes=0)
    gradient = nnx.jit(nnx.grad(lambda x, layer, step: jnp.sum(layer(x, step) * 3)))
    x = jnp.ones((2, 1))
    np.testing.assert_allclose(gradient(x, layer, jnp.float32(4)), x / 4)
    per_example = jax.vmap(jax.grad(lambda x, c: jnp.sum(fcg.gradient_clip(x, max_norm=c) * 3)))
    np.testing.assert_allclose(per_example(x, jnp.array([1.0, 2.0])), [[1], [2]])
    by_value = fcg.GradientClip(max_value=jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(by_value(x) * 3))(jnp.ones(2)), [1, 2])


def test_on_a_mesh_the_norm_is_the_whole_one():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    split = jax.device_put(jnp.ones((16, 2)), NamedSharding(mesh, PartitionSpec("data")))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(fcg.gradient_clip(x, max_norm=1.0) ** 2)))(split)
    np.testing.assert_allclose(gradient, 1 / np.sqrt(32), rtol=1e-6)
    assert gradient.sharding == split.sharding


@pytest.mark.parametrize(
    "make", [fcg.GradientClip, lambda **how: fcg.gradient_clip(jnp.ones((2, 3)), **how)]
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="takes max_value or max_norm, and neither was given"):
        make()
    with pytest.raises(ValueError, match="takes max_value or max_norm, and both was given"):
        make(max_value=1.0, max_norm=1.0)
    with pytest.raises(ValueError, match=r"batch_axes=0 says .* max_value has no use for it"):
        make(max_value=1.0, batch_axes=0)
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"max_norm={bad} must be positive"):
            make(max_norm=bad)
    with pytest.raises(TypeError, match="max_value is '1', a str; write a number"):
        make(max_value="1")


def test_what_does_not_fit_x():
    x = jnp.ones((2, 3))
    with pytest.raises(
        ValueError, match=r"max_norm has shape \(3,\); write a number or an array with"
    ):
        fcg.gradient_clip(x, max_norm=jnp.ones(3))
    with pytest.raises(ValueError, match=r"max_value has shape \(2,\), which does not broadcast"):
        fcg.gradient_clip(x, max_value=jnp.ones(2))
    with pytest.raises(ValueError, match=r"batch_axes=\(0, 2\) names an axis that x, of 2 axes"):
        fcg.gradient_clip(x, max_norm=1.0, batch_axes=(0, 2))
    with pytest.raises(TypeError, match="x is an array of complex64; it clips real gradients"):
        fcg.gradient_clip(x * 1j, max_norm=1.0)
    with pytest.raises(TypeError, match=r"GradientClip: max_value is a schedule.*layer\(x, step\)"):
        fcg.GradientClip(max_value=lambda step: step)(x)
