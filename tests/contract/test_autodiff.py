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


def test_as_a_decorator():
    @fcg.use_autodiff()
    def jacobian(layer, x):
        return jax.jacfwd(layer)(x)

    layer = fcg.Linear(3, 2, rngs=nnx.Rngs(0))
    for _ in range(2):
        np.testing.assert_allclose(jacobian(layer, jnp.ones(3)), layer.kernel[...].T)


@pytest.mark.parametrize(
    "name", ["softmax", "log_softmax", "logsumexp", "glu", "standardize", "elu"]
)
def test_functions_of_jax_that_have_been_replaced_by_ours(name, monkeypatch):
    x, expected = jnp.arange(4.0), getattr(jax.nn, name)(jnp.arange(4.0))
    monkeypatch.setattr(jax.nn, name, getattr(fcg, name))
    with fcg.use_autodiff():
        np.testing.assert_allclose(getattr(jax.nn, name)(x), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("LayerNorm", (3,)),
        ("RMSNorm", (3,)),
        ("GroupNorm", (3, 1)),
        ("InstanceNorm", (3,)),
        ("BatchNorm", (3,)),
        ("Linear", (3, 2)),
        ("LinearGeneral", (3, 2)),
        ("Conv", (3, 2, 1)),
        ("LoRALinear", (3, 2)),
    ],
)
def test_nnx_is_called_with_what_it_was_called_with(name, args, monkeypatch):
    """Exporters put calls of their own in the place of nnx's, which take an array and no more."""
    layer = getattr(fcg, name)(
        *args, rngs=nnx.Rngs(0), **({"lora_rank": 1} if name == "LoRALinear" else {})
    )
    patched = "Linear" if name == "LoRALinear" else name
    monkeypatch.setattr(getattr(nnx, patched), "__call__", lambda layer, x: 0 * x[..., :2])
    with fcg.use_autodiff():
        layer(jnp.ones((4, 5, 3)))
