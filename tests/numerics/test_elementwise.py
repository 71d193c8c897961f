"""The two elementwise operations: which rules they share, and where they differ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_customgrad as fcg
from flax_customgrad.estimators.rounding.step import Step, keep_all
from flax_customgrad.layers.activation.exponential import ELU
from flax_customgrad.layers.activation.smooth import SILU

# A step with the gradient of x^3, so that there is a second derivative to take.
CUBIC = Step("cubic", jnp.round, lambda g, x: 3 * g * x * x, keep_all)


@pytest.mark.smoke
def test_the_second_derivative_of_a_surrogate_is_that_of_its_backward():
    assert jax.jit(jax.grad(jax.grad(CUBIC)))(0.7) == pytest.approx(6 * 0.7)
    product = lambda x: CUBIC(x) * CUBIC(x)  # noqa: E731
    # (y y)'' = 2 y y'' + 2 y' y', with y = round(x).
    expected = 2 * 1.0 * 6 * 0.7 + 2 * (3 * 0.49) ** 2
    assert jax.jit(jax.grad(jax.grad(product)))(0.7) == pytest.approx(expected)


def test_a_surrogate_stays_in_force_where_autodiff_takes_an_exact_function():
    with fcg.use_autodiff():
        assert jax.grad(CUBIC)(0.7) == pytest.approx(3 * 0.49)
        assert jax.jvp(fcg.silu, (0.7,), (1.0,))[1] == pytest.approx(jax.grad(jax.nn.silu)(0.7))
        assert jax.jvp(CUBIC, (0.7,), (1.0,))[1] == pytest.approx(3 * 0.49)


def test_outside_of_a_jit_values_and_gradients_are_the_same():
    x, alpha = jnp.linspace(-2, 2, 5), jnp.array(0.3)
    for f, args in ((fcg.elu, (x, alpha)), (CUBIC, (x,))):
        both = jax.value_and_grad(lambda *args, f=f: jnp.sum(f(*args)), range(len(args)))
        eager, compiled = both(*args), jax.jit(both)(*args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, compiled)


@pytest.mark.parametrize(
    ("f", "error"),
    [
        (
            dataclasses.replace(SILU, backward=lambda g, x: g[:2]),
            r"shape \(2, 3\) but expected \(4",
        ),
        (dataclasses.replace(CUBIC, backward=lambda g, x: x > 0), r"has type bool but expected"),
        (
            dataclasses.replace(ELU, parameter_backwards=(lambda g, x, a: (g * x)[:, :2],)),
            r"shape \(2,\) but expected \(3",
        ),
        (dataclasses.replace(ELU, parameter_backwards=()), r"assert_equal failed: 0 != 1"),
    ],
    ids=["cotangent of x", "its dtype", "cotangent of a parameter", "none for it"],
)
def test_a_wrong_backward_is_refused(f, error):
    parameters = (jnp.ones(3),) if f.forward is ELU.forward else ()
    loss = lambda x, *parameters: jnp.sum(f(x, *parameters))  # noqa: E731
    with pytest.raises(AssertionError, match=error):
        jax.grad(loss, range(1 + len(parameters)))(jnp.ones((4, 3)), *parameters)


def test_a_number_has_no_gradient_and_integers_have_none():
    parameter = jnp.array([1, 2, 3])
    dx = jax.grad(lambda x: jnp.sum(fcg.leaky_relu(x, parameter)))(-jnp.ones((2, 3)))
    np.testing.assert_array_equal(dx, [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(jax.grad(lambda x: fcg.leaky_relu(x, 0.5))(-1.0), 0.5)
