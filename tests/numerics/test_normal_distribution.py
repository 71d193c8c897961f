"""The normal distribution of float32, against the error function of Python's standard library."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_customgrad.numerics.normal_distribution import normal_density, normal_distribution

X = np.linspace(-12.5, 12.5, 1001).astype(np.float32)
P = np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in X.astype(np.float64)])
DENSITY = np.exp(-(X.astype(np.float64) ** 2) / 2) / math.sqrt(2 * math.pi)


def test_both_tails_keep_their_digits():
    p = np.asarray(jax.jit(normal_distribution)(X), np.float64)
    off = np.abs(p / P - 1)
    assert off[np.abs(X) < 4].max() < 1e-6
    assert off.max() < 6e-6  # that of a rounded x^2


def test_its_derivatives_are_those_of_the_density():
    first = jax.jit(jax.vmap(jax.grad(normal_distribution)))(X)
    second = jax.jit(jax.vmap(jax.grad(jax.grad(normal_distribution))))(X)
    np.testing.assert_allclose(first, DENSITY, rtol=1e-5)
    np.testing.assert_allclose(second, -X * DENSITY, rtol=1e-5)
    assert jax.grad(normal_distribution)(0.0) == pytest.approx(1 / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("huge", [1e20, math.inf])
def test_at_infinity_it_is_its_limit(huge):
    x = jnp.array([-huge, huge])
    np.testing.assert_array_equal(normal_distribution(x), [0, 1])
    np.testing.assert_array_equal(normal_density(x), [0, 0])
    assert jnp.isnan(normal_distribution(jnp.array(jnp.nan)))


def test_float64_has_all_its_digits():
    with jax.enable_x64(True):
        p = normal_distribution(jnp.asarray(X, jnp.float64))
        np.testing.assert_allclose(p, P, rtol=1e-13)
