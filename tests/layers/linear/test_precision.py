"""Sums of half-precision gradients, against float64, on data where autodiff loses most.

8192 rows and one-signed cotangents: a bfloat16 sum stops growing once a term is smaller than half
the spacing at the sum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

ROWS = 8192
RNG = np.random.default_rng(0)


def positive(*shape):
    return jnp.asarray(np.abs(RNG.standard_normal(shape)), jnp.bfloat16)


X, G, IDS = positive(ROWS, 8), positive(ROWS, 4), jnp.asarray(RNG.integers(0, 5, ROWS))
LIMITS = {jnp.float32: 1e-6, jnp.bfloat16: 3e-3}


@pytest.fixture(params=LIMITS, ids=lambda dtype: dtype.__name__)
def param_dtype(request):
    return request.param


def error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def gradient(layer, *args, call=lambda m, x: m(x)):
    """The gradient of the sum of outputs times G; arguments are traced, so nothing is folded."""

    def loss(m, x, g):
        return jnp.sum(call(m, x).reshape(g.shape).astype(jnp.float32) * g)

    return nnx.jit(nnx.grad(loss))(layer, *args)


@pytest.mark.parametrize("cls", ["Linear", "LinearGeneral", "Einsum"])
def test_kernel_and_bias(cls, param_dtype):
    args = ("ab,bc->ac", (8, 4), 4) if cls == "Einsum" else (8, 4)
    made = {"dtype": jnp.bfloat16, "param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
    x, g = (np.asarray(a, np.float64) for a in (X, G))
    grads = gradient(getattr(fcg, cls)(*args, **made), X, G)
    assert error(grads.kernel[...], x.T @ g) <= LIMITS[param_dtype]
    assert error(grads.bias[...], g.sum(0)) <= LIMITS[param_dtype]
    grads = gradient(getattr(nnx, cls)(*args, **made), X, G)
    assert error(grads.bias[...], g.sum(0)) > 1e-3  # or this test shows nothing
    assert error(grads.kernel[...], x.T @ g) > 1e-3


@pytest.mark.parametrize("size", [5, 1], ids=["repeated tokens", "one row"])
def test_embed(size, param_dtype):
    made = {"dtype": jnp.bfloat16, "param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
    expected = np.zeros((size, 4))
    np.add.at(expected, np.asarray(IDS) % size, np.asarray(G, np.float64))
    grads = gradient(fcg.Embed(size, 4, **made), IDS % size, G)
    assert error(grads.embedding[...], expected) <= LIMITS[param_dtype]
    grads = gradient(nnx.Embed(size, 4, **made), IDS % size, G)
    assert error(grads.embedding[...], expected) > 1e-3


def test_attend(param_dtype):
    made = {"dtype": jnp.bfloat16, "param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
    expected = np.asarray(G, np.float64).T @ np.asarray(X, np.float64)
    grads = gradient(fcg.Embed(4, 8, **made), X, G, call=lambda m, x: m.attend(x))
    assert error(grads.embedding[...], expected) <= LIMITS[param_dtype]


def test_lora(param_dtype):
    layer = fcg.LoRA(
        8,
        2,
        4,
        dtype=jnp.bfloat16,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(0),
        b_initializer=nnx.initializers.normal(),
    )
    x, g, a, b = (
        np.asarray(v.astype(jnp.bfloat16), np.float64)
        for v in (X, G, layer.lora_a[...], layer.lora_b[...])
    )
    grads = gradient(layer, X, G)
    assert error(grads.lora_a[...], x.T @ (g @ b.T)) <= LIMITS[param_dtype]
    # XLA is free to keep more digits of x @ lora_a than bfloat16 has, or not to.
    assert error(grads.lora_b[...], (x @ a).T @ g) <= max(1e-4, LIMITS[param_dtype])


def test_the_input_of_a_wide_layer_keeps_its_digits():
    """An input in float32 gets its gradient in float32, not rounded to the compute dtype."""
    x = X[:64].astype(jnp.float32)
    layer = fcg.Linear(8, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    g = G[:64]
    _, pull = jax.vjp(layer, x)
    kernel = np.asarray(layer.kernel[...].astype(jnp.bfloat16), np.float64)
    assert error(pull(g)[0], np.asarray(g, np.float64) @ kernel.T) < 1e-6
