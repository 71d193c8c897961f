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


def _gradients(layer, x, g):
    """Those of scale, bias and x in float64."""
    is_centered = isinstance(layer, nnx.LayerNorm)
    d, g = np.float64(x), np.float64(g)
    h = g * np.float64(layer.scale[...])
    d = d - is_centered * d.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((d**2).mean(-1, keepdims=True) + layer.epsilon)
    rest = is_centered * h.mean(-1, keepdims=True)
    x_hat = d * rstd
    dx = rstd * (h - rest - x_hat * (h * x_hat).mean(-1, keepdims=True))
    return (g * x_hat).sum(0), g.sum(0), dx


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(
    ("residual", "dtype", "mean", "tolerance"),
    [
        ("input", jnp.float32, 0, 2e-6),
        ("input", jnp.float32, 1e4, 2e-6),
        ("input", jnp.bfloat16, 0, 1e-2),
        ("output", jnp.float32, 0, 2e-6),
    ],
)
def test_gradients_are_those_of_float64(name, residual, dtype, mean, tolerance):
    layer = _layer(name, dtype=dtype, residual=residual)
    x, g = jnp.asarray(_normal(1, mean), dtype), jnp.asarray(_normal(1, 0, seed=1), dtype)
    graphdef, params = nnx.split(layer)
    _, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
    dparams, dx = jax.jit(pull)(g)
    dscale, dbias, expected = _gradients(layer, x, g)
    pairs = [(dparams["scale"][...], dscale), (dx, expected)]
    if name == "LayerNorm":
        pairs.append((dparams["bias"][...], dbias))
    for a, b in pairs:
        np.testing.assert_allclose(np.float64(a), b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_the_derivative_for_the_input_alone(name):
    """That of flax.nnx is wrong for RMSNorm with jax 0.12, whose XLA fuses it whole."""
    layer, x, g = _layer(name), _normal(1, 3), _normal(1, 0, seed=1)
    dx = jax.jit(lambda x, g: jax.vjp(layer, x)[1](g)[0])(x, g)
    *_, expected = _gradients(layer, x, g)
    np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-6 * np.abs(expected).max())

    with fcg.use_autodiff():
        along_g = jax.jvp(layer, (x,), (g,))[1]
    np.testing.assert_allclose(np.sum(along_g * g), np.sum(expected * g), rtol=1e-4)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_stores_no_array_in_between(name, dtype):
    graphdef, params = nnx.split(_layer(name, dtype=dtype))

    def step(params, x, g):
        y, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
        return y, pull(g)

    x = jnp.ones((ROWS, FEATURES), dtype)
    memory = jax.jit(step).lower(params, x, x).compile().memory_analysis()
    # A few numbers for each row.
    assert memory.temp_size_in_bytes < 8 * 4 * ROWS
    assert memory.temp_size_in_bytes < x.nbytes


def test_rows_without_elements_and_with_one():
    for features in (0, 1):
        layer = fcg.LayerNorm(features, rngs=nnx.Rngs(0))
        y = jax.jit(layer)(jnp.ones((ROWS, features)))
        assert y.shape == (ROWS, features)
        assert not np.asarray(y).any()
