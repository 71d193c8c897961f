"""The gated products, glu, and the layers SwiGLU, GeGLU and ReGLU."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

exact = functools.partial(jax.nn.gelu, approximate=False)
PRODUCTS = {
    "swiglu": (fcg.swiglu, jax.nn.silu),
    "geglu": (fcg.geglu, jax.nn.gelu),
    "geglu, exact": (functools.partial(fcg.geglu, approximate=False), exact),
    "reglu": (fcg.reglu, jax.nn.relu),
}
by_name = pytest.mark.parametrize("name", PRODUCTS)


def weighed(f):
    def loss(*args):
        y = f(*args)
        return jnp.sum(jnp.sin(y) * jnp.cos(1.0 + jnp.arange(y.size)).reshape(y.shape))

    return loss


def gate_and_up(dtype, *shape):
    return tuple(jax.random.normal(jax.random.key(i), shape, dtype) for i in range(2))


def test_value_and_derivatives_in_float64():
    def results(f, args):
        first = jax.grad(weighed(f), (0, 1))
        second = jax.grad(lambda *args: weighed(lambda *a: first(*a)[0])(*args), (0, 1))
        return f(*args), first(*args), second(*args)

    @jax.jit
    def program(*args):
        return {
            name: (results(f, args), results(lambda gate, up, act=act: act(gate) * up, args))
            for name, (f, act) in PRODUCTS.items()
        }

    with jax.enable_x64(True):
        for name, (ours, theirs) in program(*gate_and_up(jnp.float64, 4, 5)).items():
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


@by_name
def test_dtypes_promote(name):
    ours, activation = PRODUCTS[name]
    dtypes = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.complex64)
    for gate in dtypes:
        for up in dtypes:
            args = jnp.ones(3, gate), jnp.ones(3, up)
            try:
                expected = jax.eval_shape(lambda g, u: activation(g) * u, *args).dtype
            except TypeError:
                continue
            assert jax.eval_shape(ours, *args).dtype == expected


@jax.jit
def values_and_gradients(gate, up):
    """Of every product."""

    def results(f):
        return f(gate, up), *jax.grad(lambda *args: jnp.sum(f(*args)), (0, 1))(gate, up)

    return {name: results(f) for name, (f, _) in PRODUCTS.items()}


@by_name
def test_each_gradient_is_in_the_dtype_of_its_argument(name):
    ours, _ = PRODUCTS[name]
    gate, up = jnp.ones(3, jnp.bfloat16), jnp.ones(3)
    grads = jax.eval_shape(jax.grad(lambda *args: jnp.sum(ours(*args)), (0, 1)), gate, up)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]


def test_half_precision_is_rounded_once():
    args = gate_and_up(jnp.bfloat16, 1000)
    in_half, in_full = (
        jax.tree.leaves_with_path(values_and_gradients(*(a.astype(dtype) for a in args)))
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    for (path, half), (_, full) in zip(in_half, in_full, strict=True):
        half, full = np.asarray(half, np.float64), np.asarray(full, np.float64)
        np.testing.assert_allclose(half, full, rtol=2.0**-8, atol=3e-7, err_msg=str(path))


@pytest.mark.smoke
def test_an_infinite_gate():
    gate, up = jnp.array([-jnp.inf, jnp.inf, -3e38]), jnp.full(3, 2.0)
    for name, (y, dgate, _) in values_and_gradients(gate, up).items():
        np.testing.assert_array_equal(y, [0, jnp.inf, 0], err_msg=name)
        np.testing.assert_array_equal(dgate, [0, 2, 0], err_msg=name)


@by_name
def test_shapes_must_agree(name):
    ours, _ = PRODUCTS[name]
    with pytest.raises(ValueError, match=r"glu: gate has shape \(3,\) and up \(2,\); the product"):
        ours(jnp.ones(3), jnp.ones(2))


def test_forward_mode_needs_use_autodiff():
    @jax.jit
    def tangents(*args):
        with fcg.use_autodiff():
            ours = {name: jax.jvp(f, args, args)[1] for name, (f, _) in PRODUCTS.items()}
        return {
            name: (ours[name], jax.jvp(lambda gate, up, act=act: act(gate) * up, args, args)[1])
            for name, (_, act) in PRODUCTS.items()
        }

    for name, pair in tangents(*gate_and_up(jnp.float32, 3)).items():
        np.testing.assert_allclose(*pair, rtol=1e-6, err_msg=name)


def test_glu_in_float64():
    @jax.jit
    def program(x):
        return [
            [(f(x, axis), jax.grad(weighed(lambda x: f(x, axis)))(x)) for axis in (-1, 0, 1)]  # noqa: B023
            for f in (fcg.glu, jax.nn.glu)
        ]

    with jax.enable_x64(True):
        ours, theirs = program(jax.random.normal(jax.random.key(0), (4, 6, 2), jnp.float64))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "axis"), [((4, 3), -1), ((4, 3), 2), ((), -1)])
def test_glu_splits_an_axis_of_even_size(shape, axis):
    with pytest.raises(ValueError, match=rf"glu: axis {axis} of an array of shape .* even size"):
        fcg.glu(jnp.ones(shape), axis)


def test_glu_takes_what_jax_takes():
    x = 1j * jnp.arange(4)
    np.testing.assert_array_equal(fcg.glu(x), jax.nn.glu(x))
    assert fcg.glu(jnp.ones((3, 0))).shape == (3, 0)


LAYERS = {"SwiGLU": jax.nn.silu, "GeGLU": jax.nn.gelu, "ReGLU": jax.nn.relu}


@pytest.mark.parametrize("use_bias", [False, True])
def test_a_layer_is_two_projections(use_bias):
    layers = {
        name: getattr(fcg, name)(3, 4, use_bias=use_bias, rngs=nnx.Rngs(0)) for name in LAYERS
    }
    for layer in layers.values():
        params = nnx.state(layer, nnx.Param)
        names = {"kernel", "bias"} if use_bias else {"kernel"}
        assert set(params) == {"gate", "up"}
        assert set(params["gate"]) == set(params["up"]) == names

    @nnx.jit
    def program(layers, x):
        results = {}
        for name, layer in layers.items():

            def plain(layer, x, act=LAYERS[name]):
                gate, up = (
                    x @ p.kernel[...] + (p.bias[...] if use_bias else 0) for p in layer_parts(layer)
                )
                return act(gate) * up

            results[name] = [
                nnx.value_and_grad(lambda m, x, f=f: jnp.sum(jnp.sin(f(m, x))), argnums=(0, 1))(
                    layer, x
                )
                for f in (lambda m, x: m(x), plain)
            ]
        return results

    for name, pair in program(layers, jax.random.normal(jax.random.key(0), (2, 5, 3))).items():
        ours, theirs = map(jax.tree.leaves, pair)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_constructor_is_that_of_linear():
    linear = inspect.signature(nnx.Linear.__init__).parameters
    for name in LAYERS:
        ours = dict(inspect.signature(getattr(fcg, name).__init__).parameters)
        ours.pop("approximate", None)
        assert list(ours) == list(linear)
        for argument in set(linear) - {"use_bias", "kernel_init"}:
            default = ours[argument].default
            assert default == linear[argument].default or dict(default) == {}, argument


def layer_parts(layer):
    return layer.gate, layer.up


def test_the_projections_differ():
    layer = fcg.SwiGLU(3, 4, rngs=nnx.Rngs(0))
    assert not np.allclose(layer.gate.kernel[...], layer.up.kernel[...])


def test_what_linear_takes_reaches_both_projections():
    layer = fcg.GeGLU(
        3,
        4,
        approximate=False,
        dtype=jnp.bfloat16,
        kernel_init=nnx.initializers.ones,
        rngs=nnx.Rngs(0),
    )
    for part in layer_parts(layer):
        assert part.dtype == jnp.bfloat16
        np.testing.assert_array_equal(part.kernel[...], 1)
    x = jnp.full((1, 3), 0.3)
    assert layer(x).dtype == jnp.bfloat16
    up = jnp.asarray(0.9)
    np.testing.assert_allclose(float(layer(x)[0, 0]), exact(up) * up, rtol=1e-2)


def test_a_layer_refuses_inputs_of_another_size():
    with pytest.raises(TypeError, match="contracting dimensions"):
        fcg.SwiGLU(3, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 5)))
