"""The output alone of many rows on one CPU: what XLA can fuse, and as exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

ROWS, FEATURES = 4096, 24


@pytest.fixture(autouse=True)
def _one_cpu(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def _layer(name, **kwargs):
    affine = {"scale_init": nnx.initializers.normal(1.0)}
    if name == "LayerNorm":
        affine["bias_init"] = nnx.initializers.normal(1.0)
    return getattr(fcg, name)(FEATURES, **affine, **kwargs, rngs=nnx.Rngs(0))


def _expected(layer, x):
    x = np.float64(x)
    d = x - x.mean(-1, keepdims=True) if isinstance(layer, nnx.LayerNorm) else x
    y = d / np.sqrt((d**2).mean(-1, keepdims=True) + layer.epsilon)
    y = y * np.float64(layer.scale[...])
    return y + np.float64(layer.bias[...]) if isinstance(layer, nnx.LayerNorm) else y


def _normal(scale, mean, seed=0):
    x = np.random.default_rng(seed).normal(size=(ROWS, FEATURES))
    return np.float32(scale * x + mean)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-12])
@pytest.mark.parametrize(
    ("scale", "mean"), [(1, 0), (1, 1e4), (1e-7, 0), (1e16, 1e18)], ids=lambda n: f"{n:.0e}"
)
def test_rows_are_those_of_float64(name, epsilon, scale, mean):
    layer, x = _layer(name, epsilon=epsilon), _normal(scale, mean)
    x[5], x[7] = 0, 3
    y, expected = jax.jit(layer)(x), _expected(layer, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(name, dtype):
    layer = _layer(name, dtype=dtype)
    x = jnp.asarray(_normal(1, 100), dtype)
    y, expected = jax.jit(layer)(x), _expected(layer, x)
    assert y.dtype == dtype
    tolerance = float(jnp.finfo(dtype).eps) * (np.abs(expected).max() + 1)
    np.testing.assert_allclose(np.float64(y), expected, rtol=0, atol=0.6 * tolerance)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_nothing_stops_a_fusion(name):
    text = jax.jit(_layer(name)).lower(_normal(1, 0)).as_text()
    assert not any(op in text for op in ("case", "while", "barrier", "compare", "select"))
    with_gradient = jax.jit(jax.value_and_grad(lambda x: _layer(name)(x).sum()))
    assert "barrier" in with_gradient.lower(_normal(1, 0)).as_text()


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_a_row_whose_squares_overflow_is_not_a_number_and_the_others_are(name):
    x = _normal(1, 0)
    x[3, 1], x[9, 2] = 1e20, np.inf
    y = np.asarray(jax.jit(_layer(name))(x))
    assert np.isnan(y[[3, 9]]).all()
    assert np.isfinite(np.delete(y, [3, 9], axis=0)).all()


def test_several_axes_make_a_row():
    x = _normal(1, 2).reshape(ROWS, 4, 6)
    axes = {"reduction_axes": (-2, -1), "feature_axes": (-2, -1)}
    y = jax.jit(_layer("LayerNorm", **axes))(x)
    layer = _layer("LayerNorm")
    np.testing.assert_allclose(y.reshape(ROWS, -1), jax.jit(layer)(x.reshape(ROWS, -1)), atol=2e-6)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_the_derivative_for_the_input_alone(name):
    """That of flax.nnx is wrong for RMSNorm with jax 0.12, whose XLA fuses it whole."""
    layer, x = _layer(name), _normal(1, 3)
    g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    dx = jax.jit(lambda x, g: jax.vjp(layer, x)[1](g)[0])(x, g)

    d, h = np.float64(x), g * np.float64(layer.scale[...])
    d = d - (name == "LayerNorm") * d.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((d**2).mean(-1, keepdims=True) + layer.epsilon)
    rest = (name == "LayerNorm") * h.mean(-1, keepdims=True)
    expected = rstd * (h - rest - d * rstd * (h * d * rstd).mean(-1, keepdims=True))
    np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-6 * np.abs(expected).max())

    with fcg.use_autodiff():
        along_g = jax.jvp(layer, (x,), (g,))[1]
    np.testing.assert_allclose(np.sum(along_g * g), np.sum(expected * g), rtol=1e-4)


def test_rows_without_elements_and_with_one():
    for features in (0, 1):
        layer = fcg.LayerNorm(features, rngs=nnx.Rngs(0))
        y = jax.jit(layer)(jnp.ones((ROWS, features)))
        assert y.shape == (ROWS, features)
        assert not np.asarray(y).any()
