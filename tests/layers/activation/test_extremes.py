"""Infinite, huge and undefined numbers: a value and a gradient wherever there is a limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_customgrad as fcg

INF = float("inf")

# At minus infinity and infinity: the value, and the derivative.
LIMITS = {
    "gelu": (0, 0, INF, 1),
    "gelu, exact": (0, 0, INF, 1),
    "silu": (0, 0, INF, 1),
    "mish": (0, 0, INF, 1),
    "softplus": (0, 0, INF, 1),
    "log_sigmoid": (-INF, 1, 0, 0),
    "squareplus": (0, 0, INF, 1),
    "soft_sign": (-1, 0, 1, 0),
    "tanh": (-1, 0, 1, 0),
    "sigmoid": (0, 0, 1, 0),
    "elu": (-1, 0, INF, 1),
    "selu": (-1.7580993, 0, INF, 1.0507010),
    "celu": (-1, 0, INF, 1),
    "relu": (0, 0, INF, 1),
    "relu, bits": (0, 0, INF, 1),
    "relu, output": (0, 0, INF, 1),
    "relu6": (0, 0, 6, 0),
    "hard_tanh": (-1, 0, 1, 0),
    "hard_sigmoid": (0, 0, 1, 0),
    "hard_silu": (0, 0, INF, 1),
    "leaky_relu": (-INF, 0.01, INF, 1),
}


def value_and_derivative(f, x):
    y, vjp = jax.vjp(f, x)
    return y, vjp(jnp.ones_like(y))[0]


def values_and_derivatives(pointwise, x, nth=0):
    """Of every function, ours or theirs, in one program."""

    @jax.jit
    def program(x):
        return {name: value_and_derivative(pair[nth], x) for name, pair in pointwise.items()}

    return program(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_limits(pointwise, dtype):
    with jax.enable_x64(dtype == "float64"):
        found = values_and_derivatives(pointwise, jnp.array([-INF, INF], dtype))
        rounding = max(float(jnp.finfo(dtype).eps), 1e-7)
        for name, (y, dx) in found.items():
            below, slope_below, above, slope_above = LIMITS[name]
            y, dx = (np.asarray(a, np.float64) for a in (y, dx))
            np.testing.assert_allclose(y, [below, above], rtol=rounding, err_msg=name)
            np.testing.assert_allclose(dx, [slope_below, slope_above], rtol=rounding, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_huge_and_tiny_numbers(pointwise, dtype):
    """Against float64, where all of these are numbers like any other."""
    largest = float(jnp.finfo(dtype).max)
    sizes = [largest, largest / 3, 1e30, 1e18, 1e4, 148.0, 60.0, 20.0, 1e-3, 1e-5, 0.0]
    sizes = jnp.array([s for s in sizes if s <= largest])
    x = jnp.concatenate([sizes, -sizes]).astype(dtype)
    found = values_and_derivatives(pointwise, x)
    with jax.enable_x64(True):
        expected = values_and_derivatives(pointwise, x.astype(jnp.float64))
    limits = jnp.finfo(dtype)
    smallest = 2 * float(limits.tiny)
    for name, (y, dx) in found.items():
        y64, dx64 = expected[name]
        y64 = np.where(np.abs(y64) > 1.001 * largest, np.copysign(INF, y64), y64)
        # A number below the smallest normal one may be rounded to 0. A y of 1 that is kept, in
        # float32 and float64, means a derivative of 0, as in nnx; half precision does better.
        keeps_y = name in ("tanh", "sigmoid")
        lost = {"float32": 3e-9, "bfloat16": 1e-16, "float16": 0}[dtype] if keeps_y else 0
        tolerance = {"rtol": max(2 * float(limits.eps), 4e-6), "atol": max(lost, smallest)}
        np.testing.assert_allclose(np.asarray(y, np.float64), y64, **tolerance, err_msg=name)
        np.testing.assert_allclose(np.asarray(dx, np.float64), dx64, **tolerance, err_msg=name)


def test_nothing_is_lost_that_nnx_has(pointwise):
    """Where nnx in float64 has a value and a derivative, they are these."""
    x = jnp.array([-1e3, -30.0, -3.5, 0.1, 3.5, 30.0, 1e3])
    found = values_and_derivatives(pointwise, x)
    with jax.enable_x64(True):
        expected = values_and_derivatives(pointwise, x.astype(jnp.float64), nth=1)
    for name in pointwise:
        for a, b in zip(found[name], expected[name], strict=True):
            # What nnx cancels to in float64 is no better than its eps.
            a = np.asarray(a, np.float64)
            np.testing.assert_allclose(a, b, rtol=4e-6, atol=5e-7, err_msg=name)


def test_float16_gradient_of_gelu_beyond_148():
    x = jnp.array([148.0, 1e3, 6e4], jnp.float16)
    np.testing.assert_array_equal(jax.vmap(jax.grad(fcg.gelu))(x), [1, 1, 1])
    np.testing.assert_array_equal(jax.vmap(jax.grad(fcg.gelu))(-x), [0, 0, 0])


def test_nan_stays(pointwise):
    x = jnp.array([jnp.nan, 1.0])
    compiled = values_and_derivatives(pointwise, x)
    for name, (f, _) in pointwise.items():
        for y in (f(x), compiled[name][0]):
            assert np.isnan(y).tolist() == [True, False], name


def test_squareplus_where_nnx_cancels():
    x = jnp.array([-1e4, -1e6, -1e18, -1e30])
    np.testing.assert_allclose(fcg.squareplus(x), -1 / x, rtol=1e-6)
    np.testing.assert_allclose(fcg.squareplus(-x), -x, rtol=1e-6)


def test_squareplus_without_b_is_relu():
    x = jnp.array([-2.0, 0.0, 3.0])
    y, dx = value_and_derivative(lambda x: fcg.squareplus(x, 0.0), x)
    np.testing.assert_array_equal(y, [0, 0, 3])
    np.testing.assert_array_equal(dx, [0, 0, 1])


def test_the_gradient_of_a_parameter_at_infinity():
    x = jnp.array([-INF, -1e30, 1e30, INF])
    expected = {"elu": -2, "celu": -2, "squareplus": 0}

    @jax.jit
    def gradients(p):
        def total(p, f):
            return jnp.sum(jnp.where(x < 0, f(x, p), 0))

        return {name: jax.grad(total)(p, getattr(fcg, name)) for name in expected}

    for name, gradient in gradients(jnp.array(1.0)).items():
        np.testing.assert_allclose(gradient, expected[name], atol=1e-20, err_msg=name)


@pytest.mark.smoke
def test_a_cotangent_that_overflows_does_not_pass_a_closed_gate():
    @jax.jit
    def cotangents(x, g):
        gates = (fcg.relu, fcg.relu6, fcg.hard_tanh, fcg.hard_sigmoid)
        return [jax.vjp(f, x)[1](g)[0] for f in gates]

    for dx in cotangents(jnp.array([-9.0, -8.0]), jnp.array([INF, 1.0])):
        np.testing.assert_array_equal(dx, [0, 0])
