"""The sigmoid cross entropy: optax's results, tiny losses, and infinite logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_customgrad as fcg

X = np.random.default_rng(0).normal(size=(4, 1, 3)) * 4
Y = np.random.default_rng(1).random((1, 2, 3))


def outcome(f, x, y):
    return jax.jit(jax.value_and_grad(lambda x, y: jnp.sum(jnp.sin(f(x, y))), (0, 1)))(x, y)


def test_as_optax_in_float64():
    with jax.enable_x64(True):
        got, expected = (outcome(m.sigmoid_binary_cross_entropy, X, Y) for m in (fcg, optax))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("dtype", [int, bool, np.uint8])
def test_labels_that_are_no_floats(dtype):
    labels = (Y > 0.5).astype(dtype)
    got, expected = (
        m.sigmoid_binary_cross_entropy(jnp.asarray(X), jnp.asarray(labels)) for m in (fcg, optax)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_large_and_infinite_logits():
    """Right decisions have a tiny loss and gradient; wrong ones the size of the logit."""
    x = jnp.array([80.0, -80.0, 80.0, -80.0, 1e30, jnp.inf, -jnp.inf, jnp.inf])
    y = jnp.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    losses, pull = jax.vjp(fcg.sigmoid_binary_cross_entropy, x, y)
    largest, tiny = float(jnp.finfo(jnp.float32).max), np.exp(-80)
    np.testing.assert_allclose(losses, [tiny, tiny, 80, 80, 0, 0, 0, largest], rtol=1e-5)
    dx, dy = pull(jnp.ones(8))
    np.testing.assert_allclose(dx, [-tiny, tiny, 1, -1, 0, 0, 0, 1], rtol=1e-5)
    assert np.isfinite(dy).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x, y = jnp.asarray(X, dtype), jnp.asarray(Y, dtype)
    got, pull = jax.vjp(fcg.sigmoid_binary_cross_entropy, x, y)
    wide = [a.astype(jnp.float32) for a in (x, y)]
    expected, pull32 = jax.vjp(fcg.sigmoid_binary_cross_entropy, *wide)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    for a, b in zip(pull(jnp.ones_like(got)), pull32(jnp.ones_like(got)), strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b.astype(dtype))


def test_integer_logits_are_refused():
    with pytest.raises(TypeError, match="logits are int32"):
        fcg.sigmoid_binary_cross_entropy(jnp.array([1, 2]), jnp.array([0, 1]))
