"""While a tool has products of its own in the place of those of JAX, layers compute by them."""

import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import flax_customgrad as fcg
from flax_customgrad.numerics.interception import products_are_intercepted

LAYERS = {
    "Linear": (4, 4),
    "LinearGeneral": (4, 4),
    "Einsum": ("ti,io->to", (4, 4)),
    "Conv": (4, 4, 1),
    "ConvTranspose": (4, 4, 1),
    "LoRA": (4, 2, 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_left_to_nnx_while_jax_multiplies_by_something_else(name, monkeypatch):
    layer, x = getattr(fcg, name)(*LAYERS[name], rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    of_nnx = getattr(nnx, name)
    monkeypatch.setattr(of_nnx, "__call__", lambda layer, x: "nnx computed")
    assert layer(x).shape == (2, 4)
    for module, product in (
        (lax, "dot_general"),
        (lax, "conv_general_dilated"),
        (jnp, "einsum"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, product, lambda *args, **kwargs: None)
            assert products_are_intercepted()
            assert layer(x) == "nnx computed"


def test_code_put_into_the_function_of_jax_is_differentiated(monkeypatch):
    """As qwix does it: whoever holds the function then calls the other code."""
    original = lax.dot_general.__code__

    def double(*args, **kwargs):  # as code inside of `jax.lax`, which sees the names there
        lax = __import__("jax").lax
        return 2 * lax.mul(*(a.sum() for a in args[:2]))

    layer, x = fcg.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    monkeypatch.setattr(lax.dot_general, "__code__", double.__code__)
    expected = nnx.Linear.__call__(layer, x)
    assert products_are_intercepted()
    assert layer(x) == expected
    monkeypatch.undo()
    assert lax.dot_general.__code__ is original
    assert not products_are_intercepted()
