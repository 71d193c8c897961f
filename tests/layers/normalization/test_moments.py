"""Right where nnx is not: large means, huge and tiny values, masks, constant rows."""

import itertools

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


def values_and_dx(*cases):
    """For each case (layer, x, what else it is called with): output and dx, in one program, from
    arguments that XLA cannot fold."""
    split = [nnx.split(layer) for layer, _, _ in cases]

    def run(states, xs, g):
        found = []
        for (graphdef, _), (_, _, kwargs), state, x in zip(split, cases, states, xs, strict=True):

            def call(x, graphdef=graphdef, state=state, kwargs=kwargs):
                return nnx.merge(graphdef, state, copy=True)(x, **kwargs)

            y, pull = jax.vjp(call, x)
            found.append((y, pull(g.astype(y.dtype))[0]))
        return found

    return jax.jit(run)(
        [state for _, state in split], [x for _, x, _ in cases], jnp.asarray(G, jnp.float32)
    )


def off(got, expected):
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)


NORMAL = np.random.default_rng(0).normal(size=G.shape)


@pytest.mark.parametrize("name", CENTERED)
def test_a_large_mean_costs_no_digits(name):
    means = (0.0, 100.0, 1e4, -1e5)
    cases = [
        (layer_of(name, use_fast_variance=fast), jnp.asarray(NORMAL + mean, jnp.float32), {})
        for mean, fast in itertools.product(means, (True, False))
    ]
    for (layer, x, _), (y, dx) in zip(cases, values_and_dx(*cases), strict=True):
        expected_y, expected_dx = exact(name, x, layer.epsilon)
        assert off(y, expected_y) < 1e-6
        assert off(dx, expected_dx) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_huge_values_are_normalized(name):
    sizes, dtypes = (1e18, 1e19, 1e30, 1e36), (jnp.float32, jnp.bfloat16)
    unit = np.random.default_rng(0).uniform(-1, 1, size=G.shape)
    cases = [
        (
            layer_of(name, dtype=jnp.float32),
            (jnp.asarray(unit, dtype).astype(jnp.float32) * jnp.float32(size)).astype(dtype),
            {},
        )
        for dtype, size in itertools.product(dtypes, sizes)
    ]
    found = values_and_dx(*cases)
    sizes = [size for _, size in itertools.product(dtypes, sizes)]
    for (layer, x, _), size, (y, dx) in zip(cases, sizes, found, strict=True):
        expected_y, expected_dx = exact(name, x, layer.epsilon)
        assert off(y, expected_y) < 1e-6
        if size <= 1e30:  # below that dx has no float32
            assert off(dx, expected_dx) < (1e-6 if x.dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("name", CASES)
def test_tiny_values_and_zeros_are_normalized_without_an_epsilon(name):
    cases = [
        (layer_of(name, epsilon=0.0), jnp.asarray(NORMAL * size, jnp.float32), {})
        for size in (1e-18, 1e-22, 1e-30, 0.0)
    ]
    *found, (zero_y, zero_dx) = values_and_dx(*cases)
    for (_, x, _), (y, dx) in zip(cases[:-1], found, strict=True):
        expected_y, expected_dx = exact(name, x, 0.0)
        assert off(y, expected_y) < 1e-6
        assert off(dx, expected_dx) < 1e-6
    np.testing.assert_array_equal(zero_y, 0)
    np.testing.assert_array_equal(zero_dx, 0)


def test_tiny_values_of_float64_are_normalized_without_an_epsilon():
    """The square of a factor for float64 is beyond its range."""
    with jax.enable_x64(True):
        kwargs = {"dtype": jnp.float64, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        layer = fcg.RMSNorm(8, epsilon=0.0, **kwargs)
        x = jax.random.normal(jax.random.key(0), (3, 8), jnp.float64)
        y = layer(x * 1e-170)
        np.testing.assert_allclose(y, x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)), rtol=1e-14)


@pytest.mark.parametrize("name", CENTERED)
def test_what_is_constant_becomes_zero(name):
    layer = layer_of(name)
    cases = [
        (layer, jnp.full(G.shape, constant, jnp.float32), {})
        for constant in (0.0, 1.0, 1000.1, -1e5, 1e-30)
    ]
    expected = exact(name, np.zeros(G.shape), layer.epsilon)[1]
    for y, dx in values_and_dx(*cases):
        np.testing.assert_array_equal(y, 0)
        assert off(dx, expected) < 1e-6


def test_every_pass_takes_out_the_same_mean():
    """Compiled, XLA may leave out the rounding of sum / 6 in one pass and not in another."""
    for dtype, rows in itertools.product((jnp.float32, jnp.bfloat16), (3, 6, 7)):
        layer = fcg.LayerNorm(4, reduction_axes=0, epsilon=1e-10, dtype=dtype, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(layer)
        x = jnp.full((rows, 4), 1000.1)
        y = jax.jit(lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x))(state, x)
        np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("name", CASES)
def test_where_all_is_masked_the_output_is_the_bias(name):
    x = jnp.asarray(NORMAL, jnp.float32)
    masked = jnp.zeros((8, 4, 4, 16), bool)
    some = masked if name == "BatchNorm" else masked.at[1:].set(True)
    cases = []
    for residual in ("input", "output"):
        layer = layer_of(name, residual=residual)
        if name != "RMSNorm":
            layer.bias[...] = jnp.arange(16.0)
        cases += [(layer, x, {"mask": some}), (layer, x, {})]
    bias = 0 if name == "RMSNorm" else np.broadcast_to(np.arange(16.0), (4, 4, 16))
    found = values_and_dx(*cases)
    for (y, dx), (full_y, full_dx) in (found[:2], found[2:]):
        np.testing.assert_array_equal(y[0], bias)
        np.testing.assert_array_equal(dx[0], 0)
        assert np.isfinite(y).all()
        assert np.isfinite(dx).all()
        if name != "BatchNorm":
            np.testing.assert_allclose(y[1:], full_y[1:], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(dx[1:], full_dx[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
def test_what_is_not_finite_is_seen():
    """And so is a sum that is not."""
    x = jnp.ones((5, 6)).at[0, 0].set(jnp.nan).at[1, 0].set(jnp.inf).at[2].set(1e38)
    layers = [module.LayerNorm(6, rngs=nnx.Rngs(0)) for module in (fcg, nnx)]
    for y in jax.jit(lambda x: [layer(x) for layer in layers])(x):
        assert np.isnan(y).any(1).tolist() == [True, True, True, False, False]
