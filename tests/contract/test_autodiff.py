"""use_autodiff: forward mode, and that JAX's caches know of the switch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.contract.autodiff import in_use


def op(surrogate=False):
    @fcg.custom_vjp(surrogate=surrogate)
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda res, g: (10 * g,))
    return double


def test_the_context_ends():
    assert not in_use()
    with fcg.use_autodiff():
        assert in_use()
        with fcg.use_autodiff():
            pass
        assert in_use()
    assert not in_use()
    with pytest.raises(ZeroDivisionError), fcg.use_autodiff():
        raise ZeroDivisionError
    assert not in_use()


def test_an_operation_is_differentiated_as_written_or_by_jax():
    gradient = jax.grad(op())
    assert gradient(1.0) == 10
    with fcg.use_autodiff():
        assert gradient(1.0) == 2
        assert jax.jvp(op(), (1.0,), (1.0,)) == (2, 2)
    assert gradient(1.0) == 10


def test_a_surrogate_stays_in_force():
    with fcg.use_autodiff():
        assert jax.grad(op(surrogate=True))(1.0) == 10


def test_what_was_traced_outside_is_traced_anew_inside():
    double = op()
    jitted = jax.jit(jax.grad(lambda x: double(x)))
    scanned = jax.grad(lambda x: jax.lax.scan(lambda c, _: (double(c), None), x, None, length=1)[0])
    rematted = jax.grad(jax.checkpoint(double))
    for gradient in (jitted, scanned, rematted):
        assert gradient(1.0) == 10
        with fcg.use_autodiff():
            assert gradient(1.0) == 2
        assert gradient(1.0) == 10


def test_a_converted_model_computes_as_nnx_does():
    made = lambda: nnx.Sequential(  # noqa: E731
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    )
    model, x = fcg.convert(made()), jnp.ones(3)
    with fcg.use_autodiff():
        np.testing.assert_array_equal(jax.jacfwd(model)(x), jax.jacfwd(made())(x))
