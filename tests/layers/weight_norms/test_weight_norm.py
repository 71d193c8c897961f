"""WeightNorm: nnx's results to the bit, scales that train, and kernels that nnx gets wrong."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.contract.compat import overrides_hook
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.weight_norms.weight_norm import WeightNormConfig, weight_norm

KERNEL = ("kernel",)


def linear(dtype=jnp.float32, features=(6, 4)):
    return nnx.Linear(*features, param_dtype=dtype, rngs=nnx.Rngs(0))


def conv(dtype=jnp.float32):
    return nnx.Conv(6, 4, kernel_size=(3,), param_dtype=dtype, rngs=nnx.Rngs(0))


def pair(wrapped, **kwargs):
    """A layer of ours and one of nnx whose scales are Params whatever the version of flax."""
    layers = []
    for cls in (fcg.WeightNorm, nnx.WeightNorm):
        layer = cls(wrapped(), **kwargs, rngs=nnx.Rngs(1))
        if layer.use_scale:
            layer.scales = nnx.data(
                {
                    path: nnx.Param(jax.random.normal(jax.random.key(2), scale.shape) + 2)
                    for path, scale in layer.scales.items()
                }
            )
        layers.append(layer)
    return layers


def with_kernel(values, param_dtype=jnp.float32, **kwargs):
    layer = linear(param_dtype, np.shape(values))
    layer.kernel.set_value(jnp.asarray(values, param_dtype))
    return fcg.WeightNorm(layer, **kwargs, rngs=nnx.Rngs(0))


def weighed(y):
    return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))


@nnx.jit
def values_and_grads(layers, x):
    gradient = nnx.value_and_grad(lambda m, x: weighed(m(x)), argnums=(0, 1))
    return [gradient(layer, x) for layer in layers]


@nnx.jit
def outputs(layers, *args, **kwargs):
    return [layer(*args, **kwargs) for layer in layers]


def value_and_grad(layer, x):
    return values_and_grads(nnx.List([layer]), x)[0]


@pytest.mark.smoke
def test_it_is_the_layer_of_nnx():
    assert issubclass(fcg.WeightNorm, nnx.WeightNorm)
    ours, theirs = (c.__call__ for c in (fcg.WeightNorm, nnx.WeightNorm))
    assert inspect.signature(ours) == inspect.signature(theirs)
    ours, theirs = (m.WeightNorm(linear(), rngs=nnx.Rngs(0)) for m in (fcg, nnx))
    assert vars(ours).keys() == vars(theirs).keys()
    assert jax.tree.leaves(nnx.to_pure_dict(nnx.state(ours)))
    ours, theirs = (nnx.to_pure_dict(nnx.state(layer)) for layer in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.smoke
def test_a_call_goes_through_the_hook_that_is_overridden(monkeypatch):
    """A hook that nnx no longer calls would leave the gradient to JAX."""
    layer, paths = fcg.WeightNorm(linear(), rngs=nnx.Rngs(0)), []
    hook = fcg.WeightNorm._weightnorm_inplace

    def seen(self, path, param):
        paths.append(path)
        return hook(self, path, param)

    monkeypatch.setattr(fcg.WeightNorm, "_weightnorm_inplace", seen)
    graphdef, state = nnx.split(layer)
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(
        state, jnp.ones((2, 6))
    )
    assert "weight_norm" in str(program)
    assert KERNEL in paths


@pytest.mark.smoke
def test_a_hook_that_nnx_does_not_have_fails_when_the_class_is_made():
    def _renamed_inplace(self, path, param):
        pass

    with pytest.raises(AttributeError, match=r"overrides `nnx.WeightNorm._renamed_inplace`, which"):
        overrides_hook(nnx.WeightNorm)(_renamed_inplace)


def test_it_agrees_with_autodiff_of_nnx_in_float64():
    arguments = (
        {},
        {"feature_axes": None},
        {"feature_axes": (0, -1)},
        {"feature_axes": 0, "use_scale": False},
        {"epsilon": 1e-3},
        {"dtype": jnp.float64},
    )
    with jax.enable_x64(True):
        pairs = [pair(lambda: conv(jnp.float64), **kwargs) for kwargs in arguments]
        ours, theirs = map(nnx.List, zip(*pairs, strict=True))
        x = jax.random.normal(jax.random.key(0), (2, 5, 6), jnp.float64)
        found, expected = values_and_grads(ours, x), values_and_grads(theirs, x)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    states = (nnx.to_pure_dict(nnx.state(layers)) for layers in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *states)


def test_results_and_dtypes_are_those_of_nnx():
    dtypes = list(
        itertools.product(
            (None, jnp.float32, jnp.bfloat16), (jnp.float32, jnp.bfloat16, jnp.float16)
        )
    )
    pairs = [
        pair(lambda: linear(param_dtype), dtype=dtype)  # noqa: B023
        for dtype, param_dtype in dtypes
    ]
    x = jax.random.normal(jax.random.key(0), (3, 6))
    found = outputs(nnx.List([layer for layers in pairs for layer in layers]), x)
    for i, (layers, (_, param_dtype)) in enumerate(zip(pairs, dtypes, strict=True)):
        ours, theirs = found[2 * i : 2 * i + 2]
        kernels = [layer.layer_instance.kernel[...] for layer in layers]
        assert ours.dtype == theirs.dtype
        assert kernels[0].dtype == kernels[1].dtype
        if param_dtype == jnp.float32:
            np.testing.assert_array_equal(kernels[0], kernels[1])
            np.testing.assert_array_equal(ours, theirs)
        lengths = np.linalg.norm(np.float32(kernels[0]), axis=0)
        rounding = jnp.finfo(kernels[0].dtype).eps
        np.testing.assert_allclose(lengths, layers[0].scales[KERNEL][...], rtol=2 * rounding)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.01)], ids=["sgd", "adam"])
def test_training_goes_as_with_nnx_and_moves_the_scales(optimizer):
    layers = pair(lambda: nnx.Sequential(nnx.BatchNorm(6, rngs=nnx.Rngs(0)), linear(), nnx.tanh))
    x = jax.random.normal(jax.random.key(0), (8, 6))
    before = layers[0].scales[("layers", 1, "kernel")][...]

    @nnx.jit
    def step(layer, optimizer):
        optimizer.update(layer, nnx.grad(lambda m: weighed(m(x)))(layer))

    for layer in layers:
        state = nnx.Optimizer(layer, optimizer, wrt=nnx.Param)
        for _ in range(4):
            step(layer, state)
    ours, theirs = (nnx.to_pure_dict(nnx.state(layer)) for layer in layers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)
    assert jnp.max(jnp.abs(layers[0].scales[("layers", 1, "kernel")][...] - before)) > 1e-3


# What nnx gets wrong


def test_every_size_of_kernel_gets_unit_norm_and_the_right_gradient():
    sizes = (1.0, 1e-6, 1e-7, 1e-19, 1e-30, 1e20, 1e33)
    unscaled = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    x = jax.random.normal(jax.random.key(0), (3, 6))
    layers = nnx.List([with_kernel(unscaled * np.float32(size)) for size in sizes])
    results = values_and_grads(layers, x)
    _, (expected, expected_dx) = results[0]
    for layer, size, (_, (grads, dx)) in zip(layers, sizes, results, strict=True):
        kernel = layer.layer_instance.kernel[...]
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-6)
        # v / |v| does not change with |v|, so its derivative goes as 1 / |v|.
        np.testing.assert_allclose(dx, expected_dx, rtol=1e-4, atol=1e-5)
        got, want = (g.layer_instance.kernel[...] for g in (grads, expected))
        np.testing.assert_allclose(got * np.float32(size), want, rtol=1e-4, atol=3e-6)


def test_a_float16_kernel_whose_squares_overflow():
    x = jnp.ones((2, 6), jnp.float16)
    layer = with_kernel(np.full((6, 4), 300.0), jnp.float16, dtype=jnp.float16)
    varied = with_kernel(300 + np.arange(24.0).reshape(6, 4), jnp.float16, dtype=jnp.float16)
    (_, (grads, _)), (_, (varied_grads, _)) = values_and_grads(nnx.List([layer, varied]), x)
    np.testing.assert_allclose(layer.layer_instance.kernel[...], 6**-0.5, rtol=1e-3)
    np.testing.assert_allclose(outputs(nnx.List([layer]), x)[0], 6**0.5, rtol=2e-3)
    assert jnp.all(grads.scales[KERNEL][...] != 0)
    grads = varied_grads
    assert jnp.all(jnp.isfinite(grads.layer_instance.kernel[...]))
    assert jnp.any(grads.layer_instance.kernel[...] != 0)


def test_a_column_of_zeros():
    values = np.ones((6, 2))
    values[:, 1] = 0
    cases = list(itertools.product((jnp.float32, jnp.bfloat16, jnp.float16), (1e-12, 1e-3, 0.0)))
    layers = [with_kernel(values, dtype, epsilon=epsilon) for dtype, epsilon in cases]
    # In float32 with an epsilon that of nnx is finite.
    twins = [
        nnx.WeightNorm(with_kernel(values).layer_instance, epsilon=epsilon, rngs=nnx.Rngs(0))
        for epsilon in (1e-12, 1e-3)
    ]
    results = values_and_grads(nnx.List([*layers, *twins]), jnp.ones((2, 6)))
    gradients = [grads.layer_instance.kernel[...] for _, (grads, _) in results]
    for layer, gradient in zip(layers, gradients, strict=False):
        assert jnp.all(jnp.isfinite(gradient))
        assert jnp.all(layer.layer_instance.kernel[...][:, 1] == 0)
        assert jnp.all(gradient[:, 1] != 0)
    for ours, theirs in zip(gradients[:2], gradients[-2:], strict=True):
        np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=1e-6)


@pytest.mark.parametrize("use_scale", [True, False])
def test_the_written_gradient_is_the_derivative(use_scale):
    cases = [
        ((3,), (), 1e-12),
        ((3,), (0,), 1e-4),
        ((2, 3), (1,), 1e-4),
        ((0, 3), (1,), 1e-12),
        ((2, 1, 3), (0, 2), 1e-12),
        ((2, 2, 3), (1,), 1e-4),
    ]
    with jax.enable_x64(True):
        calls, args = [], []
        for i, (shape, features, epsilon) in enumerate(cases):
            axes = NormAxes.per_feature(len(shape), features)
            calls.append(WeightNormConfig(axes, epsilon, jnp.dtype(jnp.float64)))
            keys = jax.random.split(jax.random.key(i), 3)
            v = 1 + jax.random.uniform(keys[0], shape, jnp.float64)
            scale = jax.random.normal(keys[1], tuple(shape[i] for i in axes.features), jnp.float64)
            args.append((v, scale, jax.random.normal(keys[2], v.shape, jnp.float64)))

        @jax.jit
        def pulled(args, size):
            def of(f, config, v, scale, g):
                at = (size * v, scale) if use_scale else (size * v,)
                return jax.vjp(lambda v, scale=None: f(v, scale, config), *at)[1](g)

            return [
                [of(f, config, *a) for config, a in zip(calls, args, strict=True)]
                for f in (weight_norm, weight_norm.fun)
            ]

        for size in (1e-5, 1e-3, 1.0, 1e3):
            for a, b in zip(*map(jax.tree.leaves, pulled(args, size)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13 / size)


# In a model


MODES = [
    {"graph": True, "graph_updates": True},
    {"graph": True, "graph_updates": False},
    {"graph": False, "graph_updates": False},
]


@pytest.mark.parametrize("mode", MODES, ids=["graph and updates", "graph", "tree"])
def test_stacked_layers_in_a_scan_and_remat_write_their_kernels(mode):
    x = jax.random.normal(jax.random.key(0), (2, 4))

    def run(module):
        def make(key):
            rngs = nnx.Rngs(key)
            return module.WeightNorm(nnx.Linear(4, 4, rngs=rngs), use_scale=False, rngs=rngs)

        stacked = nnx.vmap(make, **mode)(jax.random.split(jax.random.key(0), 3))
        body = nnx.remat(lambda x, layer: jnp.tanh(layer(x)), **mode)
        scan = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, **mode)
        gradient = nnx.jit(nnx.grad(lambda layer: weighed(scan(x, layer)), **mode), **mode)(stacked)
        return jax.tree.leaves(nnx.state(gradient)), stacked.layer_instance.kernel[...]

    ours, theirs = jax.jit(lambda: [run(fcg), run(nnx)])()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ours[1], axis=1), 1, rtol=1e-6)


class Gated(nnx.Module):
    """A layer that is called with more than one array."""

    def __init__(self, rngs):
        self.a, self.b = (nnx.Linear(6, 4, rngs=rngs) for _ in range(2))

    def __call__(self, x, gate, *, power):
        return self.a(x) * self.b(gate) ** power


def test_further_arguments_reach_the_wrapped_layer():
    layers = pair(lambda: Gated(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, 6))
    np.testing.assert_array_equal(*outputs(nnx.List(layers), x, x + 1, power=2))
    for name in ("a", "b"):
        kernel = getattr(layers[0].layer_instance, name).kernel[...]
        scale = layers[0].scales[(name, "kernel")][...]
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), scale, rtol=1e-6)


def test_state_goes_through_split_and_update():
    layer, fresh = (fcg.WeightNorm(linear(), rngs=nnx.Rngs(0)) for _ in range(2))
    layer.scales[KERNEL][...] = jnp.arange(1.0, 5.0)
    nnx.update(fresh, nnx.state(layer))
    x = jnp.ones((2, 6))
    merged = nnx.merge(*nnx.split(layer))
    np.testing.assert_array_equal(*outputs(nnx.List([merged, fresh]), x))
    assert isinstance(nnx.state(layer, nnx.Param)["scales"][KERNEL], nnx.Param)


def test_only_what_the_filter_selects_is_normalized():
    layer = fcg.WeightNorm(
        nnx.Embed(5, 4, rngs=nnx.Rngs(0)),
        variable_filter=nnx.PathContains("embedding"),
        feature_axes=0,
        rngs=nnx.Rngs(0),
    )
    (rows,) = outputs(nnx.List([layer]), jnp.arange(5))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    untouched = fcg.WeightNorm(linear(), variable_filter=nnx.Nothing, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 6))
    np.testing.assert_array_equal(*outputs(nnx.List([untouched, linear()]), x))


def test_a_weight_without_a_scale_is_an_error():
    layer = fcg.WeightNorm(linear(), rngs=nnx.Rngs(0))
    layer.layer_instance = Gated(nnx.Rngs(0))
    with pytest.raises(RuntimeError, match="Could not find the scale"):
        layer(jnp.ones((2, 6)), jnp.ones((2, 6)), power=1)


def test_complex_weights_and_use_autodiff_are_left_to_nnx():
    x = jnp.ones((2, 6))
    layers = pair(lambda: linear(jnp.complex64))
    np.testing.assert_array_equal(*outputs(nnx.List(layers), x))
    ours, theirs = pair(linear)
    with fcg.use_autodiff():
        tangent = jax.eval_shape(lambda x: jax.jvp(lambda x: nnx.clone(ours)(x), (x,), (x,))[1], x)
        assert tangent.shape == (2, 4)
        np.testing.assert_array_equal(*outputs(nnx.List([ours, theirs]), x))


def test_the_backward_keeps_a_number_per_feature():
    v, scale = jnp.ones((64, 8)), jnp.ones(8)
    config = WeightNormConfig(NormAxes.per_feature(2, -1), 1e-12, jnp.dtype(jnp.float32))
    assert fcg.residual_bytes(lambda *a: weight_norm(*a, config), v, scale) == 4 * 8


# convert


def test_convert_makes_params_of_the_scales_and_revert_undoes_it():
    model = nnx.Sequential(nnx.WeightNorm(linear(), rngs=nnx.Rngs(0)), nnx.relu)
    layer, x = model.layers[0], jnp.ones((2, 6))
    before = nnx.graphdef(model), jax.tree.leaves(nnx.state(model))
    assert fcg.convert(model).layers[0] is layer
    assert type(layer) is fcg.WeightNorm
    assert type(layer.layer_instance) is fcg.Linear
    assert isinstance(layer.scales[KERNEL], nnx.Param)
    converted = nnx.graphdef(model)
    assert nnx.graphdef(fcg.convert(model)) == converted
    assert fcg.revert(model).layers[0] is layer
    assert type(layer) is nnx.WeightNorm
    assert nnx.graphdef(model) == before[0]
    for a, b in zip(jax.tree.leaves(nnx.state(model)), before[1], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(layer(x), fcg.convert(model).layers[0](x), rtol=1e-5)


def test_convert_without_scales():
    layer = nnx.WeightNorm(linear(), use_scale=False, rngs=nnx.Rngs(0))
    assert type(fcg.convert(layer)) is fcg.WeightNorm
    assert layer.scales is None
    assert type(fcg.revert(layer)) is nnx.WeightNorm
