"""Right where nnx is not: large means, huge and tiny values, masks, constant rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

# Axes of the statistics, once an input of shape (8, 4, 4, 16) is seen as (8, 4, 4, 4, 4).
CASES = {
    "LayerNorm": ((16,), {}, (3, 4)),
    "GroupNorm": ((16, 4), {}, (1, 2, 4)),
    "InstanceNorm": ((16,), {}, (1, 2)),
    "BatchNorm": ((16,), {}, (0, 1, 2)),
    "RMSNorm": ((16,), {}, (3, 4)),
}
CENTERED = [name for name in CASES if name != "RMSNorm"]
G = np.random.default_rng(1).normal(size=(8, 4, 4, 16))


def layer_of(name, **kwargs):
    args, more, _ = CASES[name]
    return getattr(fcg, name)(*args, **more, **kwargs, rngs=nnx.Rngs(0))


def exact(name, x, epsilon):
    """Output and dx in float64, from the values that float32 holds."""
    axes = CASES[name][2]
    x, g = (np.asarray(a, np.float64).reshape(8, 4, 4, 4, 4) for a in (x, G))

    def mean(a):
        return a.mean(axes, keepdims=True)

    if name == "RMSNorm":
        r = 1 / np.sqrt(mean(x * x) + epsilon)
        y = x * r
        dx = r * (g - y * mean(g * y))
    else:
        r = 1 / np.sqrt(mean((x - mean(x)) ** 2) + epsilon)
        y = (x - mean(x)) * r
        dx = r * (g - mean(g) - y * mean(g * y))
    return y.reshape(8, 4, 4, 16), dx.reshape(8, 4, 4, 16)


def value_and_dx(layer, x, **kwargs):
    """Compiled, from arguments that XLA cannot fold."""
    graphdef, state = nnx.split(layer)

    def run(state, x, g):
        def call(state, x):
            return nnx.merge(graphdef, state, copy=True)(x, **kwargs)

        y, pull = jax.vjp(call, state, x)
        return y, pull(g.astype(y.dtype))[1]

    return jax.jit(run)(state, x, jnp.asarray(G, jnp.float32))


def off(got, expected):
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4, -1e5])
@pytest.mark.parametrize("name", CENTERED)
def test_a_large_mean_costs_no_digits(name, mean):
    x = jnp.asarray(np.random.default_rng(0).normal(size=G.shape) + mean, jnp.float32)
    for fast in (True, False):
        layer = layer_of(name, use_fast_variance=fast)
        y, dx = value_and_dx(layer, x)
        expected_y, expected_dx = exact(name, x, layer.epsilon)
        assert off(y, expected_y) < 1e-6
        assert off(dx, expected_dx) < 1e-6


@pytest.mark.parametrize("size", [1e18, 1e19, 1e30, 1e36])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", CASES)
def test_huge_values_are_normalized(name, size, dtype):
    x = np.random.default_rng(0).uniform(-1, 1, size=G.shape)
    x = jnp.asarray(x, dtype).astype(jnp.float32) * jnp.float32(size)
    layer = layer_of(name, dtype=jnp.float32)
    y, dx = value_and_dx(layer, x.astype(dtype))
    expected_y, expected_dx = exact(name, x.astype(dtype), layer.epsilon)
    assert off(y, expected_y) < 1e-6
    if size <= 1e30:  # below that dx has no float32
        assert off(dx, expected_dx) < (1e-6 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("size", [1e-18, 1e-22, 1e-30])
@pytest.mark.parametrize("name", CASES)
def test_tiny_values_are_normalized_without_an_epsilon(name, size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=G.shape) * size, jnp.float32)
    y, dx = value_and_dx(layer_of(name, epsilon=0.0), x)
    expected_y, expected_dx = exact(name, x, 0.0)
    assert off(y, expected_y) < 1e-6
    assert off(dx, expected_dx) < 1e-6


@pytest.mark.parametrize("constant", [0.0, 1.0, 1000.1, -1e5, 1e-30])
@pytest.mark.parametrize("name", CENTERED)
def test_what_is_constant_becomes_zero(name, constant):
    layer = layer_of(name)
    y, dx = value_and_dx(layer, jnp.full(G.shape, constant, jnp.float32))
    np.testing.assert_array_equal(y, 0)
    expected = exact(name, np.zeros(G.shape), layer.epsilon)[1]
    assert off(dx, expected) < 1e-6


@pytest.mark.parametrize("rows", [3, 6, 7])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_every_pass_takes_out_the_same_mean(dtype, rows):
    """Compiled, XLA may leave out the rounding of sum / 6 in one pass and not in another."""
    layer = fcg.LayerNorm(4, reduction_axes=0, epsilon=1e-10, dtype=dtype, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    x = jnp.full((rows, 4), 1000.1)
    y = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("name", CASES)
def test_zeros_without_an_epsilon(name):
    y, dx = value_and_dx(layer_of(name, epsilon=0.0), jnp.zeros(G.shape))
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(dx, 0)


@pytest.mark.parametrize("residual", ["input", "output"])
@pytest.mark.parametrize("name", CASES)
def test_where_all_is_masked_the_output_is_the_bias(name, residual):
    layer = layer_of(name, residual=residual)
    if name != "RMSNorm":
        layer.bias[...] = jnp.arange(16.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=G.shape), jnp.float32)
    masked = jnp.zeros((8, 4, 4, 16), bool)
    some = masked if name == "BatchNorm" else masked.at[1:].set(True)
    y, dx = value_and_dx(layer, x, mask=some)
    bias = 0 if name == "RMSNorm" else np.broadcast_to(np.arange(16.0), (4, 4, 16))
    np.testing.assert_array_equal(y[0], bias)
    np.testing.assert_array_equal(dx[0], 0)
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()
    if name != "BatchNorm":
        full = value_and_dx(layer, x)
        np.testing.assert_allclose(y[1:], full[0][1:], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(dx[1:], full[1][1:], rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_is_seen():
    """And so is a sum that is not."""
    x = jnp.ones((5, 6)).at[0, 0].set(jnp.nan).at[1, 0].set(jnp.inf).at[2].set(1e38)
    for layer in (fcg.LayerNorm(6, rngs=nnx.Rngs(0)), nnx.LayerNorm(6, rngs=nnx.Rngs(0))):
        assert np.isnan(layer(x)).any(1).tolist() == [True, True, True, False, False]
