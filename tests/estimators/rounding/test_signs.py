"""Signs and steps: the value at the boundary, the gradient as its paper states it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_customgrad as fcg

POINTS = np.array(
    [-1e30, -1e3, -2.0, -1.0, -0.5, -0.05, -0.0, 0.0, 0.05, 0.25, 0.5, 1.0, 1.5, 1e3, 1e30]
)
DTYPES = ("float16", "bfloat16", "float32", "float64")


def sign(x):
    return np.where(x >= 0, 1.0, -1.0)


def inside(c):
    return lambda x: (np.abs(x) <= c) * 1.0


def swish(beta):
    def factor(x):
        with np.errstate(over="ignore", invalid="ignore"):
            t = np.clip(beta * x / 2, -300, 300)
            return beta * (1 - t * np.tanh(t)) / np.cosh(t) ** 2

    return factor


LAYERS = {
    "SteSign": (fcg.SteSign(), sign, inside(1)),
    "SteSign, 0.5": (fcg.SteSign(0.5), sign, inside(0.5)),
    "SteSign, None": (fcg.SteSign(None), sign, np.ones_like),
    "ApproxSign": (fcg.ApproxSign(), sign, lambda x: np.maximum(0, 2 - 2 * np.abs(x))),
    "SwishSign": (fcg.SwishSign(), sign, swish(5)),
    "SwishSign, 20": (fcg.SwishSign(20.0), sign, swish(20)),
    "SteHeaviside": (fcg.SteHeaviside(), lambda x: (x > 0) * 1.0, inside(1)),
    "SteHeaviside, None": (fcg.SteHeaviside(None), lambda x: (x > 0) * 1.0, np.ones_like),
    "SteTern": (fcg.SteTern(), lambda x: sign(x) * (np.abs(x) > 0.05), inside(1)),
    "SteTern, 0.5": (fcg.SteTern(0.5, None), lambda x: sign(x) * (np.abs(x) > 0.5), np.ones_like),
}


@jax.jit
def values_and_gradients(x, g):
    """Of every layer."""

    def both(layer):
        y, pullback = jax.vjp(layer, x)
        return y, pullback(g)[0]

    return {name: both(layer) for name, (layer, *_) in LAYERS.items()}


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient(dtype):
    with jax.enable_x64(dtype == "float64"), np.errstate(over="ignore"):
        x = jnp.asarray(POINTS, dtype)
        g = np.arange(1.0, x.size + 1)
        found = values_and_gradients(x, jnp.asarray(g, dtype))
    wide = np.asarray(x, np.float64)
    # A threshold of 0.05 is not representable: it is compared in the dtype of x.
    near = np.abs(np.abs(wide) - 0.05) < 1e-3
    tolerance = {"float64": 1e-12, "float32": 2e-6}.get(dtype, 1e-2)
    for name, (_, value, factor) in LAYERS.items():
        y, dx = found[name]
        assert y.dtype == x.dtype
        y, expected = np.asarray(y, np.float64), value(wide)
        np.testing.assert_array_equal(y[~near], expected[~near], err_msg=name)
        dx, expected = np.asarray(dx, np.float64), g * factor(wide)
        np.testing.assert_allclose(dx, expected, rtol=tolerance, atol=tolerance, err_msg=name)


def test_no_number_and_infinity():
    for name, (y, dx) in values_and_gradients(
        jnp.array([-np.inf, np.inf, np.nan]), jnp.ones(3)
    ).items():
        _, value, _ = LAYERS[name]
        np.testing.assert_array_equal(y[:2], value(np.array([-9, 9.0])), err_msg=name)
        assert np.isnan(y[2]), name
        assert np.isfinite(dx[:2]).all(), name


def test_eager_as_compiled():
    x = jnp.asarray(POINTS, jnp.float32)
    compiled = values_and_gradients(x, x)
    for name, (layer, *_) in LAYERS.items():
        np.testing.assert_array_equal(layer(x), compiled[name][0], err_msg=name)


def test_a_threshold_is_compared_as_the_dtype_has_it():
    assert fcg.SteTern(0.05)(jnp.float32(0.05)) == 0
    assert fcg.SteTern(0.5)(jnp.bfloat16(0.5)) == 0


def test_twn_takes_its_threshold_from_the_array():
    x = jnp.array([0.1, -0.2, 1.0, -3.0])  # 0.7 times the mean magnitude is 0.7525
    layer = fcg.SteTern("twn")
    np.testing.assert_array_equal(layer(x), [0, 0, 1, -1])
    np.testing.assert_array_equal(jax.grad(lambda x: layer(x).sum())(x), [1, 1, 1, 0])
    many = jnp.ones(4096, jnp.float16) * 60000  # whose sum is beyond float16
    np.testing.assert_array_equal(layer(many), 1)


def test_scaled_signs_per_channel():
    w = jnp.array([[0.5, -2.0, 1.0], [-0.25, 0.0, 3.0]])
    scale = np.array([0.375, 1.0, 2.0])
    g = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    scales = {-1: scale, 1: scale, 0: np.array([[3.5 / 3], [3.25 / 3]])}

    @jax.jit
    def both(w, g):
        def values_and_gradient(cls):
            values = [cls(channel_axis=axis)(w) for axis in scales]
            return values, jax.vjp(cls(), w)[1](g)[0]

        return values_and_gradient(fcg.MagnitudeAwareSign), values_and_gradient(fcg.XNORSign)

    (values, magnitude_aware), (xnor_values, xnor) = both(w, jnp.asarray(g, jnp.float32))
    for y, xnor_y, a in zip(values, xnor_values, scales.values(), strict=True):
        np.testing.assert_allclose(y, a * sign(np.asarray(w)), 1e-6)
        np.testing.assert_array_equal(xnor_y, y)
    mask = np.abs(w) <= 1
    np.testing.assert_allclose(magnitude_aware, g * scale * mask, 1e-6)
    np.testing.assert_allclose(xnor, g * (1 / 2 + scale * mask), 1e-6)


def test_scales_are_summed_in_float32():
    w = jnp.full((4096, 2), 20.0, jnp.float16)  # whose sum is beyond float16
    np.testing.assert_array_equal(fcg.MagnitudeAwareSign()(w), 20)


def test_a_mask_of_a_byte_is_kept():
    x = jnp.ones(1000)
    assert fcg.residual_bytes(fcg.SteSign(), x) == 1000
    assert fcg.residual_bytes(fcg.SteSign(None), x) == 0
    assert fcg.residual_bytes(fcg.ApproxSign(), x) == 0  # x, which the caller holds


def test_beta_may_be_traced():
    f = jax.jit(lambda x, beta: jax.grad(fcg.SwishSign(beta))(x))
    np.testing.assert_allclose(f(0.0, 3.0), 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: fcg.SteSign(0.0), r"SteSign: clip_value=0.0 must be positive; None lets the grad"),
        (lambda: fcg.SteSign(float("nan")), r"clip_value=nan must be positive"),
        (lambda: fcg.SteHeaviside(-1.0), r"SteHeaviside: clip_value=-1.0 must be positive"),
        (lambda: fcg.SwishSign(0.0), r"SwishSign: beta=0.0 must be positive and finite"),
        (lambda: fcg.SteTern(-0.1), r"SteTern: threshold=-0.1 must be a number from 0 on, or .twn"),
        (lambda: fcg.SteTern("mean"), r"SteTern: threshold='mean' must be"),
        (lambda: fcg.SteTern(clip_value=0), r"SteTern: clip_value=0 must be positive"),
        (lambda: fcg.XNORSign(0.0), r"XNORSign: clip_value=0.0 must be positive"),
        (
            lambda: fcg.MagnitudeAwareSign(channel_axis=2)(jnp.ones((2, 3))),
            r"MagnitudeAwareSign: channel_axis=2 is no axis of weights of shape \(2, 3\)",
        ),
    ],
)
def test_bad_arguments(call, error):
    with pytest.raises(ValueError, match=error):
        call()
