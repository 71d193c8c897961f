"""Layers under the configurations of JAX that change how arrays promote, and how programs run.

What each shared piece does under each of them: a product, a convolution by slices, a
normalization, a pooling, elementwise functions with a parameter and without, rows, shaping.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

CONFIGURATIONS = {
    "strict promotion of dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "no promotion of ranks": lambda: jax.numpy_rank_promotion("raise"),
    "no jit": jax.disable_jit,
    "no NaN": lambda: jax.debug_nans(True),
    "no leaks": jax.checking_leaks,
}
X = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)


def half(cls, *args, **kwargs):
    return lambda: cls(*args, **kwargs, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


LAYERS = {
    "Linear": half(fcg.Linear, 4, 3),
    "Einsum": half(fcg.Einsum, "nti,io->nto", (4, 3), (3,)),
    "Conv, depthwise": half(fcg.Conv, 4, 4, 3, feature_group_count=4),
    "ConvTranspose": half(fcg.ConvTranspose, 4, 3, 4, strides=2),
    "BatchNorm": half(fcg.BatchNorm, 4),
    "GroupNorm": half(fcg.GroupNorm, 4, 2),
    "WeightStandardization": lambda: half(
        fcg.WeightStandardization, half(fcg.Linear, 4, 3)(), use_scale=True
    )(),
    "SwiGLU": half(fcg.SwiGLU, 4, 3),
    "max_pool": lambda: lambda x: fcg.max_pool(x, (3,), (2,), "SAME"),
    "avg_pool": lambda: lambda x: fcg.avg_pool(x, (3,), (2,), "SAME"),
    "leaky_relu": lambda: fcg.leaky_relu,
    "celu": lambda: lambda x: fcg.celu(x, 0.5),
    "squareplus": lambda: fcg.squareplus,
    "softmax": lambda: fcg.softmax,
    "gradient_clip": lambda: lambda x: fcg.gradient_clip(x, max_norm=1.0, batch_axes=0),
}


def gradients(layer, x):
    """Those of a layer's parameters and its input; of a function, of its input."""

    def loss(layer, x):
        return jnp.sum(jnp.square(layer(x).astype(jnp.float32)))

    if isinstance(layer, nnx.Module):
        return nnx.grad(loss, argnums=(0, 1))(layer, x)
    return jax.grad(loss, argnums=1)(layer, x)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_under_a_configuration(name, configuration):
    layer, x = LAYERS[name](), jnp.asarray(X)
    with CONFIGURATIONS[configuration]():
        jax.block_until_ready(gradients(layer, x))


MODULES = [name for name in LAYERS if isinstance(LAYERS[name](), nnx.Module)]


@pytest.mark.parametrize("wide", ["parameters", "inputs"])
@pytest.mark.parametrize("name", MODULES)
def test_a_layer_that_computes_in_less_than_float64_casts_back(name, wide):
    x = jnp.asarray(X, jnp.bfloat16)
    dtype = jnp.bfloat16 if wide == "parameters" else jnp.float32
    expected = gradients(with_dtype(LAYERS[name](), dtype), x)
    with jax.enable_x64(True):
        layer = with_dtype(LAYERS[name](), dtype)
        if wide == "inputs":
            x = x.astype(jnp.float64)
        else:
            for variable in jax.tree.leaves(nnx.state(layer, nnx.Param), is_leaf=is_variable):
                variable.set_raw_value(variable.get_raw_value().astype(jnp.float64))
        of_layer, of_x = gradients(layer, x)
        cast_back = of_x if wide == "inputs" else of_layer
        assert {a.dtype.name for a in jax.tree.leaves(cast_back)} == {"float64"}
        got, expected = (
            [np.asarray(a, np.float64) for a in jax.tree.leaves(tree)]
            for tree in ((of_layer, of_x), expected)
        )
    for a, b in zip(got, expected, strict=True):
        # Some are in bfloat16 here, and in float32 or float64 there.
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2 * np.abs(b).max())


def with_dtype(layer, dtype):
    for _, module in nnx.iter_graph(layer):
        if isinstance(module, nnx.Module) and hasattr(module, "dtype"):
            module.dtype = dtype
    return layer


def is_variable(leaf):
    return isinstance(leaf, nnx.Variable)


def test_arrays_that_may_not_be_promoted_are_refused_as_by_nnx():
    for library in (nnx, fcg):
        layer = library.Linear(4, 3, rngs=nnx.Rngs(0))
        with (
            jax.numpy_dtype_promotion("strict"),
            pytest.raises(Exception, match="no available implicit dtype promotion path"),
        ):
            layer(jnp.asarray(X, jnp.bfloat16))


EXPORTED = {
    "Conv, strides": lambda: fcg.Conv(4, 3, (3, 3), strides=2, rngs=nnx.Rngs(0)),
    "Conv, depthwise": lambda: fcg.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0)),
    "ConvTranspose": lambda: fcg.ConvTranspose(4, 3, (4, 4), strides=2, rngs=nnx.Rngs(0)),
    "BatchNorm": lambda: fcg.BatchNorm(4, rngs=nnx.Rngs(0)),
    "GroupNorm": lambda: fcg.GroupNorm(4, 2, rngs=nnx.Rngs(0)),
    "InstanceNorm": lambda: fcg.InstanceNorm(4, rngs=nnx.Rngs(0)),
    "standardize": lambda: lambda x: fcg.standardize(x, (1, 2)),
    "max_pool": lambda: lambda x: fcg.max_pool(x, (3, 3), (2, 2), "SAME"),
    "avg_pool": lambda: lambda x: fcg.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False),
    "the mean of an image": lambda: lambda x: fcg.avg_pool(x, x.shape[1:3]),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_images_of_symbolic_size_are_exported_with_their_gradient(name):
    graphdef, state = nnx.split(nnx.Dict(layer=EXPORTED[name]()))

    def value_and_gradient(state, x):
        def loss(state, x):
            y = nnx.merge(graphdef, state).layer(x)
            return jnp.sum(jnp.square(y)), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6, 4, 4)), jnp.float32)
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 2*h, 2*w, 4"), jnp.float32)
    exported = jax.export.export(jax.jit(value_and_gradient))(state, symbolic)
    got, expected = (jax.tree.leaves(f(state, x)) for f in (exported.call, value_and_gradient))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_where_the_batch_alone_is_symbolic_the_lowerings_stay(monkeypatch):
    layer = fcg.Conv(4, 4, (3, 3), strides=2, feature_group_count=4, rngs=nnx.Rngs(0))
    monkeypatch.setattr(nnx.Conv, "__call__", lambda *_: pytest.fail("nnx computed"))
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 6, 4, 4"), jnp.float32)
    jax.export.export(jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(layer(x))))))(x)
