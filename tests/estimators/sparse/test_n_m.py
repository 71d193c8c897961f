"""N:M sparsity: which weights are kept, the SR-STE gradient, and the layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flax_customgrad as fcg

W = jax.random.normal(jax.random.key(0), (24, 5))
X = jax.random.normal(jax.random.key(1), (7, 24))


def kept(w, n, m):
    """By hand: which rows of each group of m rows are among the n largest."""
    w = np.asarray(w)
    mask = np.zeros(w.shape, bool)
    for column in range(w.shape[1]):
        for start in range(0, len(w), m):
            group = [(-abs(w[i, column]), i) for i in range(start, start + m)]
            for _, i in sorted(group)[:n]:
                mask[i, column] = True
    return mask


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 1), (3, 8), (24, 24), (5, 24)])
def test_the_n_largest_of_every_m(n, m):
    np.testing.assert_array_equal(fcg.n_m_sparsify(W, n, m), np.where(kept(W, n, m), W, 0))


def test_the_axis():
    w = jax.random.normal(jax.random.key(2), (3, 3, 8, 2))
    by_axis = {-2: w, 0: jnp.moveaxis(w, 2, 0), 3: jnp.moveaxis(w, 2, 3), 1: jnp.moveaxis(w, 2, 1)}
    expected = fcg.n_m_sparsify(w)
    for axis, moved in by_axis.items():
        found = jnp.moveaxis(fcg.n_m_sparsify(moved, axis=axis), axis, 2)
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(fcg.n_m_sparsify(w[0, 0, :, 0], axis=0), expected[0, 0, :, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_ties_go_to_the_lowest_index(dtype):
    w = jnp.array([[1, -1, 1, -1], [0, 0, 0, 0], [2, 1, -1, 1], [1, -3, 3, 3]], dtype)
    y = jax.jit(functools.partial(fcg.n_m_sparsify, axis=1))(w)
    assert y.dtype == dtype
    np.testing.assert_array_equal(
        np.float32(y), [[1, -1, 0, 0], [0, 0, 0, 0], [2, 1, 0, 0], [0, -3, 3, 0]]
    )
    # Of four zeros two are kept: the others decay, which leaves them where they are.
    g = jax.grad(lambda w: jnp.sum(fcg.n_m_sparsify(w, decay=0.5, axis=1)))(w)
    np.testing.assert_array_equal(
        np.float32(g), 1 + 0.5 * np.float32([[0, 0, 1, -1], [0] * 4, [0, 0, -1, 1], [1, 0, 0, 3]])
    )


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_gradient_is_dense_and_decays_what_is_pruned(decay):
    with jax.enable_x64(True):
        w = jnp.array(np.asarray(W), jnp.float64)
        g = jax.random.normal(jax.random.key(3), w.shape, jnp.float64)
        for d in (decay, jnp.array(decay), np.float32(decay)):
            dw = jax.vjp(lambda w, d=d: fcg.n_m_sparsify(w, 2, 4, d), w)[1](g)[0]
            expected = np.asarray(g) + float(d) * ~kept(W, 2, 4) * np.asarray(w)
            np.testing.assert_allclose(dw, expected, rtol=1e-12)


def test_descent_shrinks_what_is_pruned():
    w = jnp.array([3.0, -1.0, 2.0, 0.5])
    g = jax.grad(lambda w: 0 * fcg.n_m_sparsify(w, 2, 4, 0.1, axis=0).sum())(w)
    np.testing.assert_allclose(w - g, [3.0, -0.9, 2.0, 0.45])


def test_the_decay_may_be_scheduled_and_has_no_gradient():
    @jax.jit
    def gradient(d):
        return jax.grad(lambda w, d: jnp.sum(fcg.n_m_sparsify(w, 2, 4, d)), (0, 1))(W, d)

    for d in (0.0, 0.25):
        dw, dd = gradient(jnp.array(d))
        np.testing.assert_allclose(dw, 1 + d * ~kept(W, 2, 4) * np.asarray(W), rtol=1e-6)
        assert dd == 0


def test_extreme_weights_and_what_is_no_number():
    inf, nan = jnp.inf, jnp.nan
    w = jnp.array([[inf, -inf, inf, 1.0], [1e38, -3e38, 2.0, 1e-38], [nan, 3.0, -4.0, 5.0]])
    y = fcg.n_m_sparsify(w, axis=1)
    expected = [[inf, -inf, 0, 0], [1e38, -3e38, 0, 0], [nan, 0, -4, 5]]
    np.testing.assert_array_equal(y, np.float32(expected))
    everything_nan = fcg.n_m_sparsify(jnp.full((4, 1), nan), axis=0)
    assert np.isnan(everything_nan).all()
    half = jnp.array([[6e4, -6e4, 6e4, 1.0]], jnp.float16)
    g = jax.grad(lambda w: jnp.sum(fcg.n_m_sparsify(w, axis=1)))(half)
    np.testing.assert_allclose(np.float32(g), [[1, 1, 13, 1]], rtol=1e-2)


def test_half_precision_is_rounded_once():
    w, g = W.astype(jnp.bfloat16), jax.random.normal(jax.random.key(4), W.shape, jnp.bfloat16)
    (half,), (wide,) = (
        jax.vjp(lambda w: fcg.n_m_sparsify(w, decay=0.3), w.astype(t))[1](g.astype(t))
        for t in (jnp.bfloat16, jnp.float32)
    )
    np.testing.assert_allclose(np.float32(half), wide, rtol=2**-8)


def test_bad_arguments():
    for n, m in ((0, 4), (5, 4), (-1, 2)):
        with pytest.raises(ValueError, match=rf"n_m_sparsify: n={n} of every m={m} weights; exp"):
            fcg.n_m_sparsify(W, n, m)
    with pytest.raises(ValueError, match=r"n_m_sparsify: the size of axis -2, 24, does not divide"):
        fcg.n_m_sparsify(W, 2, 5)
    with pytest.raises(ValueError, match=r"n_m_sparsify: axis=-2 is not an axis of weights"):
        fcg.n_m_sparsify(jnp.ones(4))
    for decay in (-0.1, float("nan"), jnp.array(-1.0), float("inf")):
        with pytest.raises(ValueError, match=r"decay=.* must be 0 or more, and finite"):
            fcg.n_m_sparsify(W, decay=decay)
        with pytest.raises(ValueError, match=r"NMSparseLinear: decay=.* must be 0 or more"):
            fcg.NMSparseLinear(8, 3, decay=decay, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"NMSparseLinear: in_features, 6, does not divide into"):
        fcg.NMSparseLinear(6, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"NMSparseLinear: n=3 of every m=2 weights"):
        fcg.NMSparseLinear(6, 3, n=3, m=2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"n_m_sparsify: the weights are int32; expected a float"):
        fcg.n_m_sparsify(jnp.ones((4, 2), jnp.int32))


def layer_of(**kwargs):
    return fcg.NMSparseLinear(24, 5, decay=0.3, rngs=nnx.Rngs(0), **kwargs)


def gradients(layer, x, call=lambda m, x: m(x)):
    return nnx.grad(lambda m, x: jnp.sum(jnp.sin(call(m, x))), argnums=(0, 1))(layer, x)


def same(ours, theirs, **tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), **tolerance)


def test_the_layer_is_linear_with_the_sparse_kernel():
    layer = layer_of()
    assert isinstance(layer, nnx.Linear)
    plain = nnx.Linear(24, 5, rngs=nnx.Rngs(0))
    same(nnx.state(layer, nnx.Param), nnx.state(plain, nnx.Param), rtol=0)
    np.testing.assert_array_equal(layer.sparse_kernel, fcg.n_m_sparsify(plain.kernel[...]))
    plain.kernel[...] = layer.sparse_kernel
    np.testing.assert_array_equal(layer(X), plain(X))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("batch", [(), (7,), (2, 3)])
def test_the_gradients_are_those_of_the_function(use_bias, batch):
    layer = layer_of(use_bias=use_bias)
    x = jax.random.normal(jax.random.key(5), (*batch, 24))

    def plain(m, x):
        y = x @ fcg.n_m_sparsify(m.kernel[...], decay=0.3)
        return y + m.bias[...] if use_bias else y

    same(gradients(layer, x), gradients(layer, x, plain), rtol=2e-5, atol=1e-6)


def test_the_layer_in_bfloat16():
    layer = layer_of(dtype=jnp.bfloat16)
    assert layer(X).dtype == jnp.bfloat16
    ours, wide = (gradients(m, X) for m in (layer, layer_of()))
    same(ours, wide, rtol=0.03, atol=0.05)
    assert ours[0].kernel.dtype == jnp.float32


def test_an_injected_operation_and_other_inputs_are_left_to_nnx():
    seen = []

    def dot_general(*args, **kwargs):
        seen.append(args[1])
        return jax.lax.dot_general(*args, **kwargs)

    layer, ours = layer_of(dot_general=dot_general), layer_of()
    dense = layer.kernel[...]
    np.testing.assert_allclose(layer(X), ours(X), rtol=1e-6)
    np.testing.assert_array_equal(seen[0], ours.sparse_kernel)
    np.testing.assert_array_equal(layer.kernel[...], dense)
    same(gradients(layer, X), gradients(ours, X), rtol=2e-5, atol=1e-6)
    whole = jnp.arange(24)
    np.testing.assert_allclose(ours(whole), ours(whole.astype(float)), rtol=1e-6)


def test_the_layer_keeps_nothing_but_what_the_caller_holds():
    graphdef, state = nnx.split(layer_of())
    kept = fcg.residual_bytes(lambda state, x: nnx.merge(graphdef, state)(x), state, X)
    assert kept == 0


def test_the_decay_of_a_layer_may_be_a_variable():
    class Decay(nnx.Variable):
        pass

    layer = fcg.NMSparseLinear(24, 5, decay=Decay(jnp.array(0.3)), rngs=nnx.Rngs(0))
    gradient = nnx.jit(lambda m, x: gradients(m, x)[0].kernel[...])
    same(gradient(layer, X), gradients(layer_of(), X)[0].kernel[...], rtol=1e-5, atol=1e-6)
    layer.decay[...] = jnp.array(0.0)
    plain = fcg.NMSparseLinear(24, 5, decay=0.0, rngs=nnx.Rngs(0))
    same(gradient(layer, X), gradients(plain, X)[0].kernel[...], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [16, 8])
def test_a_kernel_whose_inputs_are_split_over_devices(rows):
    """Groups of 4 that lie on one device each, and groups that two devices share."""
    w = jax.random.normal(jax.random.key(6), (rows, 6))
    devices = np.array(jax.devices()).reshape(4, 2)
    explicit = (AxisType.Explicit, AxisType.Explicit)
    grid = jax.sharding.Mesh(devices, ("data", "model"), axis_types=explicit)

    def both(w):
        y, pull = jax.vjp(lambda w: fcg.n_m_sparsify(w, decay=0.3), w)
        return y, pull(jnp.sin(w))[0]

    expected = both(w)
    with jax.set_mesh(grid):
        placed = jax.device_put(w, NamedSharding(grid, PartitionSpec("data", "model")))
        found = jax.jit(both)(placed)
        assert all(jax.typeof(a).sharding == jax.typeof(placed).sharding for a in found)
    same(found, expected, rtol=1e-6)


def test_a_sparse_layer_learns():
    """A target that two inputs of every four make: the layer finds which."""
    x = jax.random.normal(jax.random.key(7), (200, 8))
    target = jnp.array([[0.0, 2.0, 0.0, -1.0, 1.5, 0.0, 0.0, 0.5]]).T
    layer = fcg.NMSparseLinear(8, 1, use_bias=False, decay=1e-2, rngs=nnx.Rngs(1))

    @nnx.jit
    def step(layer):
        grads = nnx.grad(lambda m: jnp.mean((m(x) - x @ target) ** 2))(layer)
        layer.kernel[...] -= 0.1 * grads.kernel[...]

    for _ in range(200):
        step(layer)
    np.testing.assert_allclose(layer.sparse_kernel, target, atol=1e-3)
