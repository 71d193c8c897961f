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


def test_the_n_largest_of_every_m():
    patterns = [(1, 2), (2, 4), (1, 1), (3, 8), (24, 24), (5, 24)]
    found = jax.jit(lambda w: [fcg.n_m_sparsify(w, n, m) for n, m in patterns])(W)
    for y, (n, m) in zip(found, patterns, strict=True):
        np.testing.assert_array_equal(y, np.where(kept(W, n, m), W, 0))


def test_the_axis():
    w = np.asarray(jax.random.normal(jax.random.key(2), (3, 3, 8, 2)))
    axes = (-2, 0, 3, 1)

    @jax.jit
    def sparsified(w, by_axis, one):
        moved = [fcg.n_m_sparsify(v, axis=a) for v, a in zip(by_axis, axes, strict=True)]
        return fcg.n_m_sparsify(w), moved, fcg.n_m_sparsify(one, axis=0)

    expected, moved, one = sparsified(w, [np.moveaxis(w, 2, a) for a in axes], w[0, 0, :, 0])
    for axis, y in zip(axes, moved, strict=True):
        np.testing.assert_array_equal(np.moveaxis(y, axis, 2), expected)
    np.testing.assert_array_equal(one, expected[0, 0, :, 0])


@pytest.mark.smoke
def test_ties_go_to_the_lowest_index():
    w = np.float32([[1, -1, 1, -1], [0, 0, 0, 0], [2, 1, -1, 1], [1, -3, 3, 3]])
    dtypes = (jnp.float32, jnp.bfloat16, jnp.float16)

    @jax.jit
    def values_and_gradients(w):
        value = functools.partial(fcg.n_m_sparsify, axis=1)
        gradient = jax.grad(lambda w: jnp.sum(fcg.n_m_sparsify(w, decay=0.5, axis=1)))
        return [(value(w.astype(d)), gradient(w.astype(d))) for d in dtypes]

    expected = [[1, -1, 0, 0], [0, 0, 0, 0], [2, 1, 0, 0], [0, -3, 3, 0]]
    # Of four zeros two are kept: the others decay, which leaves them where they are.
    decayed = np.float32([[0, 0, 1, -1], [0] * 4, [0, 0, -1, 1], [1, 0, 0, 3]])
    for dtype, (y, g) in zip(dtypes, values_and_gradients(w), strict=True):
        assert y.dtype == g.dtype == dtype
        np.testing.assert_array_equal(np.float32(y), expected)
        np.testing.assert_array_equal(np.float32(g), 1 + 0.5 * decayed)


def test_the_gradient_is_dense_and_decays_what_is_pruned():
    with jax.enable_x64(True):
        w = np.asarray(W, np.float64)
        g = np.random.default_rng(3).standard_normal(w.shape)
        decays = [kind(d) for d in (0.0, 0.3) for kind in (float, np.float64, np.float32)]

        @jax.jit
        def gradients(w, g):
            return [jax.vjp(lambda w, d=d: fcg.n_m_sparsify(w, 2, 4, d), w)[1](g) for d in decays]

        for d, (dw,) in zip(decays, gradients(w, g), strict=True):
            np.testing.assert_allclose(dw, g + float(d) * ~kept(W, 2, 4) * w, rtol=1e-12)


def test_descent_shrinks_what_is_pruned():
    w = np.float32([3.0, -1.0, 2.0, 0.5])
    g = jax.jit(jax.grad(lambda w: 0 * fcg.n_m_sparsify(w, 2, 4, 0.1, axis=0).sum()))(w)
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
    w = np.float32([[inf, -inf, inf, 1.0], [1e38, -3e38, 2.0, 1e-38], [nan, 3, -4, 5], [nan] * 4])
    half = np.float16([[6e4, -6e4, 6e4, 1.0]])

    @jax.jit
    def sparsified(w, half):
        gradient = jax.grad(lambda w: jnp.sum(fcg.n_m_sparsify(w, axis=1)))
        return fcg.n_m_sparsify(w, axis=1), gradient(half)

    y, g = sparsified(w, half)
    expected = [[inf, -inf, 0, 0], [1e38, -3e38, 0, 0], [nan, 0, -4, 5], [nan] * 4]
    np.testing.assert_array_equal(y, np.float32(expected))
    np.testing.assert_allclose(np.float32(g), [[1, 1, 13, 1]], rtol=1e-2)


def test_half_precision_is_rounded_once():
    g = jax.random.normal(jax.random.key(4), W.shape, jnp.bfloat16)

    @jax.jit
    def gradients(w, g):
        return [
            jax.vjp(lambda w: fcg.n_m_sparsify(w, decay=0.3), w.astype(t))[1](g.astype(t))[0]
            for t in (jnp.bfloat16, jnp.float32)
        ]

    half, wide = gradients(W.astype(jnp.bfloat16), g)
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
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def total(params, x):
        outputs = jax.tree.leaves(call(nnx.merge(graphdef, params, rest), x))
        return sum(jnp.sum(jnp.sin(y)) for y in outputs)

    return jax.jit(jax.grad(total, (0, 1)))(params, x)


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
def test_the_gradients_are_those_of_the_function(use_bias):
    """Of inputs without, with one and with two batch axes."""
    layer = layer_of(use_bias=use_bias)
    draw = np.random.default_rng(5).standard_normal
    xs = [draw((*batch, 24)).astype(np.float32) for batch in ((), (7,), (2, 3))]

    def plain(m, x):
        y = x @ fcg.n_m_sparsify(m.kernel[...], decay=0.3)
        return y + m.bias[...] if use_bias else y

    ours = gradients(layer, xs, lambda m, xs: [m(x) for x in xs])
    expected = gradients(layer, xs, lambda m, xs: [plain(m, x) for x in xs])
    same(ours, expected, rtol=2e-5, atol=1e-6)


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


@pytest.mark.parametrize("shape", [(3,), (1, 3), (1,), ()])
def test_a_replaced_bias_and_a_variable_as_the_input_mean_what_they_mean_in_nnx(shape):
    def gradients(layer):
        layer.bias = nnx.Param(jnp.full(shape, 0.5))
        x = nnx.Param(jnp.linspace(-1, 1, 16).reshape(2, 8))
        found = nnx.grad(lambda layer, x: jnp.sum(jnp.square(layer(x))), argnums=(0, 1))(layer, x)
        return jax.tree.leaves(found)

    sparse = fcg.NMSparseLinear(8, 3, n=4, m=4, rngs=nnx.Rngs(0))  # which prunes nothing
    expected = gradients(nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    for a, b in zip(gradients(sparse), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
