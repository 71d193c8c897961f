"""SpectralNorm: nnx's results and state, and kernels that nnx gets wrong."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.layers.weight_norms.spectral_norm import spectral_norm

KERNEL, U, SIGMA = ("kernel",), ("kernel", "u"), ("kernel", "sigma")


def linear(dtype=jnp.float32):
    return nnx.Linear(6, 4, param_dtype=dtype, rngs=nnx.Rngs(0))


def conv(dtype=jnp.float32):
    return nnx.Conv(6, 4, kernel_size=(3,), param_dtype=dtype, rngs=nnx.Rngs(0))


def pair(wrapped, **kwargs):
    return [m.SpectralNorm(wrapped(), **kwargs, rngs=nnx.Rngs(1)) for m in (fcg, nnx)]


def weighed(y):
    return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))


@nnx.jit
def values_and_grads(layers, x):
    gradient = nnx.value_and_grad(lambda m, x: weighed(m(x)), argnums=(0, 1))
    return [gradient(layer, x) for layer in layers]


@nnx.jit
def outputs(layers, x, update_stats=None):
    return [layer(x, update_stats=update_stats) for layer in layers]


def assert_close(ours, theirs, **tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float64(a), np.float64(b), **tolerance)


@pytest.mark.smoke
def test_it_is_the_layer_of_nnx():
    assert issubclass(fcg.SpectralNorm, nnx.SpectralNorm)
    for name in ("__init__", "__call__"):
        ours, theirs = (getattr(c, name) for c in (fcg.SpectralNorm, nnx.SpectralNorm))
        assert inspect.signature(ours) == inspect.signature(theirs)
    ours, theirs = pair(linear)
    assert vars(ours).keys() == vars(theirs).keys()
    assert_close(nnx.state(ours), nnx.state(theirs), rtol=0)
    assert type(fcg.convert(theirs)) is fcg.SpectralNorm
    assert type(fcg.revert(theirs)) is nnx.SpectralNorm


@pytest.mark.parametrize("wrapped", [linear, conv])
def test_it_agrees_with_autodiff_of_nnx_in_float64(wrapped):
    arguments = ({}, {"n_steps": 3}, {"n_steps": 0}, {"epsilon": 1e-3}, {"update_stats": False})
    with jax.enable_x64(True):
        pairs = [
            pair(lambda: wrapped(jnp.float64), **kwargs, param_dtype=jnp.float64)
            for kwargs in arguments
        ]
        x = jax.random.normal(jax.random.key(0), (2, 5, 6), jnp.float64)
        ours, theirs = map(nnx.List, zip(*pairs, strict=True))
        found, expected = values_and_grads(ours, x), values_and_grads(theirs, x)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_close(nnx.state(ours), nnx.state(theirs), rtol=1e-12)


@pytest.mark.smoke
def test_a_call_goes_through_the_hook_that_is_overridden(monkeypatch):
    """A hook that nnx no longer calls would leave the gradient to JAX."""
    layer, paths = fcg.SpectralNorm(linear(), rngs=nnx.Rngs(0)), []
    hook = fcg.SpectralNorm._spectral_normalize_inplace

    def seen(self, path, *args, **kwargs):
        paths.append(path)
        return hook(self, path, *args, **kwargs)

    monkeypatch.setattr(fcg.SpectralNorm, "_spectral_normalize_inplace", seen)
    assert "spectral_norm" in str(jax.make_jaxpr(lambda x: nnx.clone(layer)(x))(jnp.ones((2, 6))))
    assert KERNEL in paths


def test_sigma_has_a_gradient_as_in_nnx():
    def penalty(m, x):
        return weighed(m(x)) + m.batch_stats[SIGMA][...] ** 2

    x = jnp.ones((2, 6))
    gradient = nnx.jit(nnx.grad(penalty))
    assert_close(*(gradient(layer, x) for layer in pair(linear)), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # nnx's
def test_dtypes_are_those_of_nnx():
    pairs = [
        pair(lambda: linear(param_dtype), dtype=dtype, param_dtype=stats_dtype)  # noqa: B023
        for dtype, stats_dtype, param_dtype in itertools.product(
            (None, jnp.bfloat16),
            (jnp.float32, jnp.bfloat16),
            (jnp.float32, jnp.bfloat16, jnp.float16),
        )
    ]
    x = jax.random.normal(jax.random.key(0), (3, 6))
    ours, theirs = map(nnx.List, zip(*pairs, strict=True))
    assert_close(outputs(ours, x), outputs(theirs, x), rtol=0.05, atol=0.02)
    assert_close(nnx.state(ours), nnx.state(theirs), rtol=0.05, atol=0.02)


def test_statistics_are_updated_when_asked():
    x = jnp.ones((2, 6))
    call = nnx.jit(lambda layer, x, update: layer(x, update_stats=update), static_argnums=2)
    for update in (None, True, False):
        layers = pair(linear, update_stats=False)
        before = layers[0].batch_stats[U][...]
        np.testing.assert_array_equal(*(call(layer, x, update) for layer in layers))
        assert_close(*map(nnx.state, layers), rtol=0)
        assert bool(jnp.any(layers[0].batch_stats[U][...] != before)) == bool(update)
    ours, theirs = pair(linear)
    for layer in (ours, theirs):
        layer.eval()
        call(layer, x, None)
    assert_close(nnx.state(ours), nnx.state(theirs), rtol=0)


def test_training_goes_as_with_nnx():
    def model():
        return nnx.Sequential(nnx.BatchNorm(6, rngs=nnx.Rngs(0)), linear(), nnx.tanh)

    layers = pair(model)
    x = jax.random.normal(jax.random.key(0), (8, 6))

    @nnx.jit
    def step(layer, optimizer):
        optimizer.update(layer, nnx.grad(lambda m: weighed(m(x)))(layer))

    for layer in layers:
        optimizer = nnx.Optimizer(layer, optax.adam(0.01), wrt=nnx.Param)
        for _ in range(4):
            step(layer, optimizer)
    assert_close(*map(nnx.state, layers), rtol=1e-4, atol=1e-5)


# What nnx gets wrong


def test_every_size_of_kernel_gets_singular_value_1():
    sizes = (1e-19, 1e-7, 1.0, 1e20)
    layers = nnx.List([fcg.SpectralNorm(linear(), n_steps=3, rngs=nnx.Rngs(0)) for _ in sizes])
    for layer, size in zip(layers, sizes, strict=True):
        # One singular value is large: the power iteration soon finds it.
        unscaled = 0.02 * layer.layer_instance.kernel[...] + jnp.outer(jnp.ones(6), jnp.arange(4.0))
        layer.layer_instance.kernel[...] = unscaled * size
    outputs(layers, jnp.ones((2, 6)))
    for layer in layers:
        norm = np.linalg.norm(layer.layer_instance.kernel[...], ord=2)
        np.testing.assert_allclose(norm, 1, rtol=1e-4)


def test_a_float16_kernel_is_normalized_in_float32():
    layer = fcg.SpectralNorm(
        linear(jnp.float16), n_steps=3, param_dtype=jnp.float16, rngs=nnx.Rngs(0)
    )
    unscaled = 0.02 * layer.layer_instance.kernel[...] + jnp.outer(jnp.ones(6), jnp.arange(4.0))
    layer.layer_instance.kernel[...] = (300 * unscaled).astype(jnp.float16)
    outputs(nnx.List([layer]), jnp.ones((2, 6)))
    kernel = layer.layer_instance.kernel[...]
    assert kernel.dtype == layer.batch_stats[U].dtype == jnp.float16
    np.testing.assert_allclose(np.linalg.norm(np.float32(kernel), ord=2), 1, rtol=2e-3)


def test_a_kernel_of_zeros_is_left_as_in_nnx():
    layers = pair(lambda: nnx.Linear(6, 4, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros))
    x = jnp.ones((2, 6))
    assert_close(*values_and_grads(nnx.List(layers), x), rtol=1e-6)
    assert_close(*map(nnx.state, layers), rtol=0)


def test_a_singular_value_of_zero_leaves_the_gradient():
    w, u, v = jnp.eye(2), jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]])
    (normalized, sigma), pull = jax.vjp(lambda w: spectral_norm(w, u, v), w)
    np.testing.assert_array_equal(normalized, w)
    assert sigma == 0
    g = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(pull((g, jnp.float32(5)))[0], g + 5 * v.T * u)


def test_second_derivatives_hold_the_vectors_constant():
    with jax.enable_x64(True):
        w, u, v = (
            jax.random.normal(jax.random.key(i), shape, jnp.float64)
            for i, shape in enumerate([(3, 2), (1, 2), (1, 3)])
        )

        @jax.jit
        def hessians(w):
            def of(f):
                return jax.hessian(lambda w: jnp.sum(jnp.sin(f(w, u, v)[0])) * f(w, u, v)[1])(w)

            return of(spectral_norm), of(spectral_norm.fun)

        ours, theirs = hessians(w)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


# In a model

MODES = [
    {"graph": True, "graph_updates": True},
    {"graph": True, "graph_updates": False},
    {"graph": False, "graph_updates": False},
]


@pytest.mark.parametrize("mode", MODES, ids=["graph and updates", "graph", "tree"])
def test_stacked_layers_in_a_scan_and_remat_write_kernels_and_statistics(mode):
    x = jax.random.normal(jax.random.key(0), (2, 4))

    def run(module):
        def make(key):
            rngs = nnx.Rngs(key)
            return module.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)

        stacked = nnx.vmap(make, **mode)(jax.random.split(jax.random.key(0), 3))
        body = nnx.remat(lambda x, layer: jnp.tanh(layer(x)), **mode)
        scan = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, **mode)
        gradient = nnx.jit(nnx.grad(lambda layer: weighed(scan(x, layer)), **mode), **mode)(stacked)
        return jax.tree.leaves(nnx.state(gradient)), jax.tree.leaves(nnx.state(stacked))

    ours, theirs = jax.jit(lambda: [run(fcg), run(nnx)])()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_errors_are_those_of_nnx():
    with pytest.raises(ValueError, match="3D but error_on_non_matrix is True"):
        fcg.SpectralNorm(conv(), error_on_non_matrix=True, rngs=nnx.Rngs(0))
    late, missing = (fcg.SpectralNorm(linear(), rngs=nnx.Rngs(0)) for _ in range(2))
    late.error_on_non_matrix = True
    late.layer_instance = conv()
    with pytest.raises(ValueError, match="3D but error_on_non_matrix is True"):
        late(jnp.ones((2, 5, 6)))
    missing.batch_stats = nnx.data({})
    with pytest.raises(RuntimeError, match="Could not find the path for u"):
        missing(jnp.ones((2, 6)))


def test_use_autodiff_is_left_to_nnx():
    ours, theirs = pair(linear)
    x = jnp.ones((2, 6))
    with fcg.use_autodiff():
        tangent = jax.eval_shape(lambda x: jax.jvp(lambda x: nnx.clone(ours)(x), (x,), (x,))[1], x)
        assert tangent.shape == (2, 4)
        np.testing.assert_array_equal(*outputs(nnx.List([ours, theirs]), x))


def test_the_backward_keeps_vectors_beside_the_kernel():
    w, u, v = jnp.ones((4, 16, 8)), jnp.ones((1, 8)), jnp.ones((1, 64))
    kept = fcg.residual_bytes(lambda w: spectral_norm(w, u, v), w)
    assert kept <= 4 * (64 + 8 + 1)
