"""The command that trains in few bits: its recipes cover the catalogue, and it can fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_customgrad import catalogue
from flax_customgrad.__main__ import main
from flax_customgrad.command.digits import controlled, recipes
from flax_customgrad.command.digits.blocks import ActivationBlock
from flax_customgrad.model.tree import layers

FAMILIES = {"quantizers", "quant_layers", "int8", "fp8", "microscaling"}

# What is no layer of a network of vectors.
WITHOUT = {
    "QuantLinearGeneral",
    "QuantEinsum",
    "QuantConv",
    "QuantConvTranspose",
    "QuantEmbed",
    "BinaryConv",
    "TernaryConv",
    "Int8Conv",
    "Fp8Einsum",
}


def _network(recipe):
    """A recipe's network, of which only the state that a backward writes is computed."""

    def build():
        return recipe.build(nnx.Rngs(0))

    return nnx.eval_shape(build) if recipe.vmap_seeds else build()


def test_recipes_cover_the_catalogue():
    used = set()
    for recipe in recipes.RECIPES.values():
        network = _network(recipe)
        hidden = next(layer for layer in network.layers if isinstance(layer, ActivationBlock))
        grads = nnx.eval_shape(nnx.grad(lambda m: m(jnp.ones((2, 64))).sum()), hidden)
        assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(hidden, nnx.Param))
        used |= {type(layer).__name__ for _, layer in layers(network)}
    entries = {e.name for e in catalogue.entries() if e.family in FAMILIES}
    assert entries - WITHOUT <= used


@pytest.mark.parametrize(("quantized", "control"), [(0.92, 0.5), (0.95, 0.93)])
def test_what_learns_less_than_float32_is_a_failure(capsys, monkeypatch, quantized, control):
    outcomes = iter([(0.95, 0.5), (quantized, control)])

    def trained(*args, **kwargs):
        return controlled.ControlledResult(*(np.full(2, share) for share in next(outcomes)))

    monkeypatch.setattr(controlled, "train_with_control", trained)
    assert main(["quantized", "FakeQuant W8A8", "--markdown"]) == 1
    out, err = capsys.readouterr()
    behind = 100 * (0.95 - quantized)
    assert out.splitlines()[-1] == (
        f"| FakeQuant W8A8 | {100 * quantized:.1f} ± 0.0 % | 95.0 % | {behind:.1f} points | 1 | "
        f"{100 * control:.1f} % |"
    )
    assert err == (
        "flax-customgrad quantized: further behind float32 than allowed, or less than 5 points "
        "ahead of a zero gradient: FakeQuant W8A8\n"
    )


def test_a_recipe_that_there_is_not(capsys):
    assert main(["quantized", "W1A1"]) == 2
    assert "no recipe 'W1A1' to train with; there are 'FakeQuant W8A8'" in capsys.readouterr().err
