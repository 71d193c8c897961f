"""The gated products, glu, and the layers SwiGLU, GeGLU and ReGLU."""

import functools

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


@by_name
def test_value_and_derivatives_in_float64(name):
    ours, activation = PRODUCTS[name]
    with jax.enable_x64(True):
        args = gate_and_up(jnp.float64, 4, 5)

        def results(f):
            first = jax.grad(weighed(f), (0, 1))
            second = jax.grad(lambda *args: weighed(lambda *a: first(*a)[0])(*args), (0, 1))
            return jax.jit(lambda *args: (f(*args), first(*args), second(*args)))(*args)

        for a, b in zip(
            jax.tree.leaves(results(ours)),
            jax.tree.leaves(results(lambda gate, up: activation(gate) * up)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


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


@by_name
def test_each_gradient_is_in_the_dtype_of_its_argument(name):
    ours, _ = PRODUCTS[name]
    gate, up = jnp.ones(3, jnp.bfloat16), jnp.ones(3)
    grads = jax.grad(lambda *args: jnp.sum(ours(*args)), (0, 1))(gate, up)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]


@by_name
def test_half_precision_is_rounded_once(name):
    ours, _ = PRODUCTS[name]
    args = gate_and_up(jnp.bfloat16, 1000)
    wide = tuple(a.astype(jnp.float32) for a in args)
    for half, full in zip(
        (ours(*args), *jax.grad(lambda *a: jnp.sum(ours(*a)), (0, 1))(*args)),
        (ours(*wide), *jax.grad(lambda *a: jnp.sum(ours(*a)), (0, 1))(*wide)),
        strict=True,
    ):
        half, full = np.asarray(half, np.float64), np.asarray(full, np.float64)
        np.testing.assert_allclose(half, full, rtol=2.0**-8, atol=3e-7)


@by_name
def test_an_infinite_gate(name):
    ours, _ = PRODUCTS[name]
    gate, up = jnp.array([-jnp.inf, jnp.inf, -3e38]), jnp.full(3, 2.0)
    np.testing.assert_array_equal(ours(gate, up), [0, jnp.inf, 0])
    dgate = jax.grad(lambda gate: jnp.sum(ours(gate, up)))(gate)
    np.testing.assert_array_equal(dgate, [0, 2, 0])


@by_name
def test_shapes_must_agree(name):
    ours, _ = PRODUCTS[name]
    with pytest.raises(ValueError, match=r"glu: gate has shape \(3,\) and up \(2,\); the product"):
        ours(jnp.ones(3), jnp.ones(2))


@by_name
def test_forward_mode_needs_use_autodiff(name):
    ours, activation = PRODUCTS[name]
    args = gate_and_up(jnp.float32, 3)
    with fcg.use_autodiff():
        _, tangent = jax.jvp(ours, args, args)
    _, expected = jax.jvp(lambda gate, up: activation(gate) * up, args, args)
    np.testing.assert_allclose(tangent, expected, rtol=1e-6)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_glu_in_float64(axis):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (4, 6, 2), jnp.float64)
        ours, theirs = (
            jax.jit(lambda x, f=f: (f(x, axis), jax.grad(weighed(lambda x: f(x, axis)))(x)))(x)
            for f in (fcg.glu, jax.nn.glu)
        )
        for a, b in zip(ours, theirs, strict=True):
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


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("use_bias", [False, True])
def test_a_layer_is_two_projections(cls, use_bias):
    layer = getattr(fcg, cls)(3, 4, use_bias=use_bias, rngs=nnx.Rngs(0))
    params = nnx.state(layer, nnx.Param)
    names = {"kernel", "bias"} if use_bias else {"kernel"}
    assert set(params) == {"gate", "up"}
    assert set(params["gate"]) == set(params["up"]) == names

    def plain(layer, x):
        project = [x @ p.kernel[...] + (p.bias[...] if use_bias else 0) for p in layer_parts(layer)]
        return LAYERS[cls](project[0]) * project[1]

    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    ours, theirs = (
        nnx.value_and_grad(lambda m, x, f=f: jnp.sum(jnp.sin(f(m, x))), argnums=(0, 1))(layer, x)
        for f in (lambda m, x: m(x), plain)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


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
