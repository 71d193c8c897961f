"""Few-bit activations: the tables are the best ones, and the backward keeps what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.gradients.few_bit.few_bit import GELU_TABLES, SILU_TABLES

FUNCTIONS = {
    "gelu": (fcg.few_bit_gelu, nnx.gelu, lambda x: nnx.gelu(x, approximate=False), GELU_TABLES),
    "silu": (fcg.few_bit_silu, nnx.silu, nnx.silu, SILU_TABLES),
}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_levels_are_means_and_borders_lie_halfway(name, bits):
    _, _, function, tables = FUNCTIONS[name]
    borders, levels = np.array(tables[bits].borders), np.array(tables[bits].levels)
    with jax.enable_x64(True):
        edges = jnp.array([0.0, *borders, 10.0])
        means = jnp.diff(function(edges)) / jnp.diff(edges)
        slopes = jax.vmap(jax.grad(function))(edges[1:-1])
    np.testing.assert_allclose(levels, means, atol=2e-5)
    np.testing.assert_allclose(slopes, (levels[1:] + levels[:-1]) / 2, atol=2e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_more_bits_are_closer_to_the_derivative(name):
    few_bit, function, _, _ = FUNCTIONS[name]
    x = jnp.linspace(-10, 10, 4001)
    exact = jax.vmap(jax.grad(function))(x)
    rms = [
        float(jnp.sqrt(jnp.mean((jax.grad(lambda x, b=b: few_bit(x, b).sum())(x) - exact) ** 2)))
        for b in (1, 2, 4)
    ]
    # What the docstrings say.
    stated = {"gelu": [0.084, 0.045, 0.0125], "silu": [0.104, 0.049, 0.015]}[name]
    np.testing.assert_allclose(rms, stated, rtol=0.03)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_function_is_that_of_the_exact_layer_to_the_bit(name):
    few_bit, _, _, _ = FUNCTIONS[name]
    x = 4 * jax.random.normal(jax.random.key(0), (64, 3))
    np.testing.assert_array_equal(few_bit(x), getattr(fcg, name)(x))


@pytest.mark.parametrize(("bits", "kept"), [(1, 8 * 2), (2, 8 * 4), (4, 8 * 8)])
def test_it_keeps_bits(bits, kept):
    found = fcg.residuals(lambda x: fcg.few_bit_gelu(x, bits), jnp.ones((8, 16)))
    assert sum(r.nbytes for r in found) == kept


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0, 5), (2, 1)])
def test_odd_shapes(shape):
    x = jnp.full(shape, -0.3)
    gradient = jax.grad(lambda x: fcg.few_bit_gelu(x).sum())(x)
    np.testing.assert_allclose(gradient, np.full(shape, 1 - 0.68047), rtol=1e-6)


def test_integers_and_numbers_are_taken_as_nnx_takes_them():
    np.testing.assert_array_equal(fcg.few_bit_gelu(jnp.arange(3)), nnx.gelu(jnp.arange(3)))
    np.testing.assert_allclose(fcg.few_bit_gelu(1.5), nnx.gelu(1.5), rtol=1e-6)


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ValueError, match="few_bit_gelu: bits=3, expected 1, 2 or 4"):
        fcg.few_bit_gelu(jnp.ones(3), bits=3)
