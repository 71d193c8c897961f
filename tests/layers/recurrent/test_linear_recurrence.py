"""linear_recurrence: against a loop differentiated by JAX, real and complex; and its arguments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_customgrad as fcg
from flax_customgrad.layers.recurrent.linear_recurrence import at_once, by_step

RNG = np.random.default_rng(0)


def real(*shape):
    return jnp.asarray(RNG.standard_normal(shape))


def imaginary(*shape):
    return lax.complex(real(*shape), real(*shape))


def loop(a, b, h0, axis, reverse):
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    a, b = (jnp.moveaxis(jnp.broadcast_to(x, shape), axis, 0) for x in (a, b))
    h = jnp.broadcast_to(h0, b.shape[1:])
    states = []
    for t in range(len(b))[:: -1 if reverse else 1]:
        h = a[t] * h + b[t]
        states.append(h)
    return jnp.moveaxis(jnp.stack(states[:: -1 if reverse else 1]), 0, axis)


CASES = {
    "real": lambda: (real(2, 5, 4), real(2, 5, 4), real(2, 4), 1),
    "real, one factor for all steps": lambda: (real(4), real(2, 5, 4), real(4), -2),
    "complex": lambda: (imaginary(5, 1), imaginary(2, 5, 4), imaginary(2, 4), -2),
    "real factors, complex terms": lambda: (real(4), imaginary(2, 5, 4), real(1, 4), 1),
    "complex factors, real terms": lambda: (imaginary(2, 5, 4), real(5, 1), real(), -2),
    "complex state alone": lambda: (real(5, 4), real(5, 1), imaginary(4), 0),
    "one step": lambda: (real(1, 4), real(2, 1, 4), real(4), -2),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_cotangents(case):
    with jax.enable_x64(True):
        *arrays, axis = CASES[case]()

        def outcome(f, reverse):
            h, pull = jax.vjp(lambda *arrays: f(*arrays, axis=axis, reverse=reverse), *arrays)
            g = jnp.cos(jnp.arange(h.size)).reshape(h.shape).astype(h.dtype)
            return h, *pull(g * (1 + 0.5j) if jnp.iscomplexobj(h) else g)

        @jax.jit
        def outcomes():
            return [
                [outcome(f, reverse) for reverse in (False, True)]
                for f in (fcg.linear_recurrence, loop)
            ]

        for a, b in zip(*map(jax.tree.leaves, outcomes()), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("reverse", [False, True])
def test_both_ways_to_compute_agree(reverse):
    """A CPU runs step by step, other devices an associative scan."""
    with jax.enable_x64(True):
        a, b, h0 = imaginary(5, 1, 4), imaginary(5, 2, 4), imaginary(2, 4)
        got, expected = (jax.jit(partial(f, reverse=reverse))(a, b, h0) for f in (at_once, by_step))
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_a_factor_of_zero_forgets():
    """Sequences that are packed into one are those alone, with their gradients."""
    first, second, a = real(3, 2), real(4, 2), real(7, 2).at[3].set(0.0)

    def packed(a, first, second):
        return fcg.linear_recurrence(a, jnp.concatenate([first, second]))

    def apart(a, first, second):
        parts = (a[:3], first), (a[3:], second)
        return jnp.concatenate([fcg.linear_recurrence(*part) for part in parts])

    @jax.jit
    def outcomes(g):
        found = [jax.vjp(f, a, first, second) for f in (packed, apart)]
        return [(h, *pull(g)) for h, pull in found]

    (h, da, *db), (expected_h, expected_da, *expected_db) = outcomes(real(7, 2))
    for x, y in zip((h, *db), (expected_h, *expected_db), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    # The gradient of the factor that is 0 is what it would bring back.
    apart_from_it = np.arange(7) != 3
    np.testing.assert_allclose(da[apart_from_it], expected_da[apart_from_it], rtol=1e-5, atol=1e-6)
    assert jnp.isfinite(da).all()


def test_half_precision_is_rounded_once():
    a, b = jnp.full((1000, 1), 0.999, jnp.bfloat16), jnp.ones((1000, 1), jnp.bfloat16)
    h, pull = jax.vjp(fcg.linear_recurrence, a, b)
    exact, exact_pull = jax.vjp(fcg.linear_recurrence, a.astype(jnp.float32), b.astype(jnp.float32))
    assert h.dtype == jnp.bfloat16
    np.testing.assert_array_equal(h, exact.astype(jnp.bfloat16))
    for got, expected in zip(pull(jnp.ones_like(h)), exact_pull(jnp.ones_like(exact)), strict=True):
        got, expected = np.asarray(got, np.float32), np.asarray(expected)
        np.testing.assert_allclose(got, expected, rtol=8e-3)


def test_what_is_kept():
    a, b = jnp.ones((64,)), jnp.ones((4, 32, 64))
    found = [r for r in fcg.residuals(fcg.linear_recurrence, a, b) if not r.is_argument]
    assert sum(r.nbytes for r in found) <= b.nbytes + 2 * 4 * 64 * 4  # h and h0


@pytest.mark.smoke
def test_shapes_without_elements_and_errors():
    assert fcg.linear_recurrence(jnp.ones((2, 0, 3)), jnp.ones((2, 0, 3))).shape == (2, 0, 3)
    assert fcg.linear_recurrence(jnp.ones((0, 2, 3)), jnp.ones((2, 3))).shape == (0, 2, 3)
    with pytest.raises(TypeError, match=r"b is int32; write b.astype\(jnp.float32\)"):
        fcg.linear_recurrence(0.5, jnp.ones((2, 3), int))
    with pytest.raises(ValueError, match="axis=-2 of states of shape"):
        fcg.linear_recurrence(0.5, jnp.ones(3))
    with pytest.raises(ValueError, match=r"h0 of shape \(3, 2\) does not broadcast to a state"):
        fcg.linear_recurrence(0.5, jnp.ones((5, 2)), jnp.ones((3, 2)))


def test_forward_mode_and_second_derivatives():
    a, b = real(5, 2), real(5, 2)

    def total(a):
        return jnp.sum(jnp.sin(fcg.linear_recurrence(a, b)))

    def expected(a):
        return jnp.sum(jnp.sin(loop(a, b, jnp.zeros(2), 0, False)))

    got, want = jax.jit(jax.hessian(total))(a), jax.jit(jax.hessian(expected))(a)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
