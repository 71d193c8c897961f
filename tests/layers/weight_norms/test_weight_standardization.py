"""WeightStandardization: mean 0, variance 1 for each feature, and weights that stay in place."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_customgrad as fcg

KERNEL = ("kernel",)


def linear(module=nnx, **kwargs):
    return module.Linear(6, 4, rngs=nnx.Rngs(0), **kwargs)


def conv(**kwargs):
    return nnx.Conv(6, 4, kernel_size=(3,), rngs=nnx.Rngs(0), **kwargs)


def wrap(layer, **kwargs):
    return fcg.WeightStandardization(layer, **kwargs, rngs=nnx.Rngs(1))


def weighed(y):
    return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))


@nnx.jit
def values_and_grads(layers, x):
    gradient = nnx.value_and_grad(lambda m, x: weighed(m(x)), argnums=(0, 1))
    return [gradient(layer, x) for layer in layers]


@nnx.jit
def outputs(layers, *args, **kwargs):
    return [layer(*args, **kwargs) for layer in layers]


class Plain(nnx.Module):
    """What a WeightStandardization says it does, in the plainest words."""

    def __init__(self, layer, features, scale, epsilon):
        self.layer = layer
        self.features = features
        self.scale = None if scale is None else nnx.Param(scale)
        self.epsilon = epsilon

    def __call__(self, x):
        layer = nnx.clone(self.layer)
        v = self.layer.kernel[...]
        axes = tuple(i for i in range(v.ndim) if i not in self.features)
        w = v - v.mean(axes, keepdims=True)
        w = w / jnp.sqrt(jnp.mean(w**2, axes, keepdims=True) + self.epsilon)
        if self.scale is not None:
            w = w * jnp.expand_dims(self.scale[...], axes)
        layer.kernel[...] = w
        return layer(x)


class Seen(nnx.Module):
    """Returns the kernel that a call sees."""

    def __init__(self, kernel):
        self.kernel = nnx.Param(kernel)

    def __call__(self, x):
        return self.kernel[...]


@pytest.mark.parametrize(
    ("wrapped", "feature_axes", "features"),
    [(linear, -1, (1,)), (conv, -1, (2,)), (conv, None, ()), (conv, (0, -1), (0, 2))],
    ids=["linear", "conv", "whole", "two axes"],
)
def test_it_agrees_with_autodiff_in_float64(wrapped, feature_axes, features):
    layers, plain = nnx.List([]), nnx.List([])
    with jax.enable_x64(True):
        for use_scale, epsilon in itertools.product((False, True), (1e-10, 1e-3)):
            layer = wrap(
                wrapped(param_dtype=jnp.float64),
                feature_axes=feature_axes,
                use_scale=use_scale,
                scale_init=nnx.initializers.normal(),
                epsilon=epsilon,
                param_dtype=jnp.float64,
            )
            scale = layer.scales[KERNEL][...] if use_scale else None
            layers.append(layer)
            plain.append(Plain(wrapped(param_dtype=jnp.float64), features, scale, epsilon))
        x = jax.random.normal(jax.random.key(0), (2, 5, 6), jnp.float64)
        ours, theirs = values_and_grads(layers, x), values_and_grads(plain, x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_a_kernel_with_a_large_mean():
    kernels = []
    for offset, size in itertools.product((0, 1e2, 1e4), (1.0, 1e20)):
        kernel = np.random.default_rng(0).standard_normal((64, 4)) + offset
        kernels.append((kernel * size).astype(np.float32))
    found = outputs(nnx.List([wrap(Seen(jnp.asarray(kernel))) for kernel in kernels]), None)
    for kernel, got in zip(kernels, found, strict=True):
        exact = kernel.astype(np.float64)
        expected = (exact - exact.mean(0)) / exact.std(0)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_column_of_one_value_is_zero_with_a_finite_gradient():
    cases = [(jnp.float32, 1e-10), (jnp.float32, 0.0), (jnp.bfloat16, 0.0), (jnp.float16, 1e-5)]
    layers = [
        wrap(Seen(jnp.full((6, 4), 1000.1, dtype)), epsilon=epsilon) for dtype, epsilon in cases
    ]
    for value, (grads, _) in values_and_grads(nnx.List(layers), jnp.ones(())):
        assert value == 0
        assert jnp.all(jnp.isfinite(grads.layer_instance.kernel[...]))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def test_dtypes(param_dtype):
    kernel = 64 + jax.random.normal(jax.random.key(0), (6, 4), param_dtype)
    cases = list(itertools.product((False, True), (None, jnp.float32, jnp.bfloat16)))
    layers = [wrap(Seen(kernel), dtype=dtype, use_scale=use_scale) for use_scale, dtype in cases]
    found = outputs(nnx.List(layers), None)
    exact = np.float64(kernel)
    expected = (exact - exact.mean(0)) / exact.std(0)
    for (use_scale, dtype), layer, w in zip(cases, layers, found, strict=True):
        assert w.dtype == (dtype or (jnp.float32 if use_scale else param_dtype))
        assert layer.layer_instance.kernel.dtype == param_dtype
        eps = float(jnp.finfo(w.dtype).eps)
        np.testing.assert_allclose(np.float64(w), expected, rtol=eps, atol=4 * eps)


def test_the_weights_that_train_stay_in_the_layer():
    x = jax.random.normal(jax.random.key(0), (8, 6))
    layer = wrap(
        nnx.Sequential(linear(fcg), nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.tanh),
        use_scale=True,
    )
    kernel = layer.layer_instance.layers[0].kernel
    before = kernel[...]
    outputs(nnx.List([layer]), x)
    np.testing.assert_array_equal(kernel[...], before)
    assert jnp.any(layer.layer_instance.layers[1].mean[...] != 0)

    @nnx.jit
    def step(layer, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: weighed(m(x)))(layer)
        optimizer.update(layer, grads)
        return loss

    optimizer = nnx.Optimizer(layer, optax.adam(0.01), wrt=nnx.Param)
    losses = [step(layer, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert jnp.max(jnp.abs(kernel[...] - before)) > 0.01


@pytest.mark.smoke
def test_an_error_of_the_layer_leaves_the_weights():
    layer = wrap(linear())
    before = layer.layer_instance.kernel[...]
    with pytest.raises(TypeError):
        layer(jnp.ones((2, 5)))
    np.testing.assert_array_equal(layer.layer_instance.kernel[...], before)


MODES = [
    {"graph": True, "graph_updates": True},
    {"graph": True, "graph_updates": False},
    {"graph": False, "graph_updates": False},
]


@pytest.mark.parametrize("mode", MODES, ids=["graph and updates", "graph", "tree"])
def test_stacked_layers_in_a_scan_and_remat(mode):
    x = jax.random.normal(jax.random.key(0), (2, 4))

    def make(key):
        rngs = nnx.Rngs(key)
        linear = nnx.Linear(4, 4, rngs=rngs)
        return fcg.WeightStandardization(linear, use_scale=True, rngs=rngs)

    keys = jax.random.split(jax.random.key(0), 3)
    stacked = nnx.jit(nnx.vmap(make, **mode), **mode)(keys)
    before = stacked.layer_instance.kernel[...]
    body = nnx.remat(lambda x, layer: jnp.tanh(layer(x)), **mode)
    scan = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, **mode)
    gradient = nnx.jit(nnx.grad(lambda layer: weighed(scan(x, layer)), **mode), **mode)(stacked)
    np.testing.assert_array_equal(stacked.layer_instance.kernel[...], before)

    layers = nnx.List([make(key) for key in keys])

    def loss(layers):
        y = x
        for layer in layers:
            y = jnp.tanh(layer(y))
        return weighed(y)

    one_by_one = nnx.jit(nnx.grad(loss))(layers)
    for i, expected in one_by_one.items():
        np.testing.assert_allclose(
            gradient.layer_instance.kernel[...][i],
            expected["layer_instance"]["kernel"][...],
            rtol=1e-4,
            atol=1e-6,
        )


class Gated(nnx.Module):
    """A layer that is called with more than one array."""

    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(6, 4, rngs=rngs) for _ in range(2))

    def __call__(self, x, gate, *, power):
        return self.a(x) * self.b(gate) ** power


def test_further_arguments_reach_the_wrapped_layer():
    x = jax.random.normal(jax.random.key(0), (2, 6))
    layer = wrap(Gated(nnx.Rngs(0)), variable_filter=nnx.PathContains("a"))
    inner = layer.layer_instance
    expected = wrap(nnx.clone(inner.a))(x) * inner.b(x + 1) ** 2
    (found,) = outputs(nnx.List([layer]), x, x + 1, power=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_state_goes_through_split_and_update():
    layer, fresh = (wrap(linear(), use_scale=True) for _ in range(2))
    layer.scales[KERNEL][...] = jnp.arange(1.0, 5.0)
    nnx.update(fresh, nnx.state(layer))
    x = jnp.ones((2, 6))
    merged = nnx.merge(*nnx.split(layer))
    np.testing.assert_array_equal(*outputs(nnx.List([merged, fresh]), x))
    assert isinstance(nnx.state(layer, nnx.Param)["scales"][KERNEL], nnx.Param)


def test_use_autodiff_allows_forward_mode():
    layer, x = wrap(linear()), jnp.ones((2, 6))
    with fcg.use_autodiff():
        tangent = jax.eval_shape(lambda x: jax.jvp(lambda x: nnx.clone(layer)(x), (x,), (x,))[1], x)
        assert tangent.shape == (2, 4)


def test_wrong_use_is_explained():
    with pytest.raises(ValueError, match="selects no parameter of Linear; there are bias, kernel"):
        wrap(linear(), variable_filter=nnx.PathContains("weight"))
    with pytest.raises(ValueError, match="axis 2 does not exist: the input has 2 axes"):
        wrap(linear(), feature_axes=2)
    with pytest.raises(TypeError, match="kernel is complex64: expected a floating dtype"):
        wrap(linear(param_dtype=jnp.complex64))
    changed = wrap(linear(), use_scale=True)
    changed.layer_instance = nnx.Sequential(linear())
    with pytest.raises(ValueError, match="no gain for layers/0/kernel: wrap the layer again"):
        changed(jnp.ones((2, 6)))
