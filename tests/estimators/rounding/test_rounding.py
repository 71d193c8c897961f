"""Rounding and clipping: the value to the bit, the gradient as stated, above all at the bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

# Halves, their neighbours, large values, signed zeros, and what is no number.
POINTS = np.array(
    [-np.inf, -1e30, -2.5, -1.5, -0.5, -0.0, 0.0, 0.25, 0.5, 0.75, 1.5, 2.5, 3.0, 1e30, np.inf]
)
ROUNDINGS = {
    fcg.round_ste: np.round,
    fcg.floor_ste: np.floor,
    fcg.ceil_ste: np.ceil,
    fcg.trunc_ste: np.trunc,
}
DTYPES = ("float16", "bfloat16", "float32")


def array(values, dtype):
    with np.errstate(over="ignore"):  # 1e30 is infinite in float16
        return jnp.asarray(values, dtype)


def gradient(f, x):
    """The cotangents 1, 2, 3, ... through a function."""
    g = jnp.arange(1.0, x.size + 1).reshape(x.shape).astype(x.dtype)
    return jax.vjp(f, x)[1](g)[0], g


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_to_the_bit_and_passes_the_gradient(dtype):
    @jax.jit
    def program(x):
        return [(f(x), *gradient(f, x)) for f in ROUNDINGS]

    x = array([*POINTS, np.nan], dtype)
    for reference, (y, dx, g) in zip(ROUNDINGS.values(), program(x), strict=True):
        assert y.dtype == x.dtype
        expected = reference(np.asarray(x, np.float64))
        np.testing.assert_array_equal(np.asarray(y, np.float64), expected)
        np.testing.assert_array_equal(dx, g)
        assert np.isnan(y[-1])


def test_rounding_keeps_nothing():
    assert fcg.residuals(lambda x: fcg.round_ste(x), jnp.ones(5)) == []


def test_integers_stay_and_have_no_gradient():
    np.testing.assert_array_equal(fcg.round_ste(jnp.arange(3)), [0, 1, 2])
    assert fcg.round_ste(jnp.arange(3)).dtype == jnp.int32
    assert fcg.floor_ste(1.5) == 1
    assert fcg.ceil_ste(np.float32(1.5)) == 2


def test_clip_is_not_halved_at_a_bound():
    # The trap: jnp.clip has derivative 1/2 where a value is rounded onto the bound.
    @jax.jit
    @jax.vmap
    def gradients(x):
        naive = jax.grad(lambda x: jnp.clip(fcg.round_ste(x), -1, 1))
        ours = jax.grad(lambda x: fcg.clip_ste(fcg.round_ste(x), -1, 1, gradient="masked"))
        return naive(x), ours(x)

    naive, ours = gradients(jnp.array([-1.6, -1.4, -1.0, -0.8, 0.2, 0.8, 1.0, 1.4, 1.6]))
    np.testing.assert_array_equal(naive[1:4], 0.5)
    np.testing.assert_array_equal(ours, [0, 1, 1, 1, 1, 1, 1, 1, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip(dtype):
    @jax.jit
    def program(x):
        def results(how):
            f = functools.partial(fcg.clip_ste, low=-0.5, high=2.5, gradient=how)
            return f(x), *gradient(f, x)

        return jnp.clip(x, -0.5, 2.5), {how: results(how) for how in ("pass_through", "masked")}

    x = array([*POINTS, np.nan], dtype)
    expected, found = program(x)
    inside = (np.asarray(x, np.float64) >= -0.5) & (np.asarray(x, np.float64) <= 2.5)
    for how, (y, dx, g) in found.items():
        np.testing.assert_array_equal(np.asarray(y, np.float64), np.asarray(expected, np.float64))
        np.testing.assert_array_equal(dx, np.where(inside | (how == "pass_through"), g, 0))
        assert np.isnan(y[-1])


def test_bounds_may_be_arrays_and_traced_and_have_no_gradient():
    x, low = jnp.array([[-2.0, 3.0], [0.5, 0.5]]), jnp.array([-1.0, 0.0])
    f = jax.jit(lambda x, low: fcg.clip_ste(x, low, 2.0, gradient="masked"))
    np.testing.assert_array_equal(f(x, low), [[-1, 2], [0.5, 0.5]])
    dx, dlow = jax.grad(lambda x, low: f(x, low).sum(), argnums=(0, 1))(x, low)
    np.testing.assert_array_equal(dx, [[0, 0], [1, 1]])
    np.testing.assert_array_equal(dlow, [0, 0])
    assert fcg.clip_ste(x.astype(jnp.bfloat16), low, 2.0).dtype == jnp.bfloat16


def test_an_infinite_cotangent_beyond_the_bounds_is_zero():
    f = lambda x: fcg.clip_ste(x, -1, 1, gradient="masked")  # noqa: E731
    np.testing.assert_array_equal(jax.vjp(f, jnp.array([3.0]))[1](jnp.array([jnp.inf]))[0], [0])


def test_stochastic_rounding_is_right_in_the_mean_and_lands_beside():
    x = jnp.arange(-12, 13) / 4
    keys = jax.random.split(jax.random.key(0), 4000)
    y = jax.jit(jax.vmap(lambda key: fcg.stochastic_round(x, key)))(keys)
    assert ((y == jnp.floor(x)) | (y == jnp.floor(x) + 1)).all()
    np.testing.assert_allclose(y.mean(0), x, atol=0.04)
    np.testing.assert_array_equal(y[:, ::4], np.broadcast_to(x[::4], y[:, ::4].shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding_of_what_is_whole_or_no_number(dtype):
    whole = array([-np.inf, -1e30, -3, 0, 2048, 1e30, np.inf], dtype)
    y = fcg.stochastic_round(whole, jax.random.key(1))
    np.testing.assert_array_equal(y, whole)
    assert y.dtype == whole.dtype
    assert np.isnan(fcg.stochastic_round(jnp.asarray(np.nan, dtype), jax.random.key(1)))


def test_stochastic_rounding_of_large_values_is_right_in_the_mean():
    # floor(x + u) is not: the sum is a multiple of 1/2, and ends above in 3 of 4 cases.
    x = jnp.full(4096, 2.0**22 + 0.5)
    up = fcg.stochastic_round(x, jax.random.key(2)) > x
    np.testing.assert_allclose(up.mean(), 0.5, atol=0.05)


def test_the_layer_draws_anew_at_each_call():
    layer = fcg.StochasticRound(rngs=nnx.Rngs(0))
    x = jnp.full(64, 0.5)
    first, second = layer(x), layer(x)
    assert (first != second).any()
    again = fcg.StochasticRound(rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(again(x), first)
    gradient = nnx.grad(lambda layer, x: layer(x).sum(), argnums=1)(layer, x)
    np.testing.assert_array_equal(gradient, 1)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: fcg.clip_ste(1.0, 0, 1, gradient="none"), r"gradient='none' is none of 'pass_thr"),
        (lambda: fcg.clip_ste(1.0, 2, 1), r"clip_ste: low=2 is above high=1"),
        (lambda: fcg.clip_ste(jnp.ones(3), jnp.ones(2), 1), r"clip_ste: a parameter of shape \(2,"),
        (lambda: fcg.clip_ste(jnp.ones(3), jnp.ones((2, 3)), 1), r"does not broadcast to x"),
    ],
)
def test_bad_arguments(call, error):
    with pytest.raises(ValueError, match=error):
        call()


def test_complex_and_8_bit_arrays_are_refused():
    with pytest.raises(TypeError, match=r"round_ste takes float16, .* got complex64"):
        fcg.round_ste(jnp.ones(2, jnp.complex64))
    with pytest.raises(TypeError, match=r"got float8_e4m3fn: cast it"):
        fcg.round_ste(jnp.ones(2, jnp.float8_e4m3fn))


def test_nothing_is_rounded_in_an_empty_array():
    assert fcg.round_ste(jnp.ones((0, 3))).shape == (0, 3)
    assert fcg.stochastic_round(jnp.ones((0, 3)), jax.random.key(0)).shape == (0, 3)
