"""Networks in few bits: for each recipe one in which the hidden layers are quantized.

The first and the last layer are in float32, as is usual; two hidden ones are not. Around each
quantized layer stand batch normalization and a rectifier.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from flax_customgrad.command.digits.probe import CLASSES, PIXELS, Activation
from flax_customgrad.normalization.batch_norm import BatchNorm
from flax_customgrad.quantized.fake_quant import FakeQuant
from flax_customgrad.quantized.quant_linear import QuantLinear

_WIDTH = 64


@dataclass(frozen=True)
class Recipe:
    """A way to quantize the hidden layers of a network.

    Attributes:
        linear: makes a hidden layer, as `nnx.Linear` is made.
        within: how many points it may be less accurate than the network in float32.
        activation: what stands between two layers.
    """

    linear: Callable[..., nnx.Module]
    within: float = 1.0
    activation: Callable[[jax.Array], jax.Array] = nnx.relu

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the network."""
        hidden = functools.partial(Activation, self.activation, self.linear, _WIDTH, _WIDTH)
        return nnx.Sequential(
            nnx.Linear(PIXELS, _WIDTH, use_bias=False, rngs=rngs),
            BatchNorm(_WIDTH, momentum=0.9, rngs=rngs),
            self.activation,
            hidden(rngs),
            hidden(rngs),
            nnx.Linear(_WIDTH, CLASSES, rngs=rngs),
        )


def _quantized(weight: Callable[[], Any], activation: Callable[[], Any]) -> Recipe:
    def linear(*features: int, **kwargs: Any) -> nnx.Module:
        return QuantLinear(*features, weight=weight(), activation=activation(), **kwargs)

    return Recipe(linear)


def _fake_quant(bits: int) -> Recipe:
    return _quantized(lambda: FakeQuant(bits, axis=-1), lambda: FakeQuant(bits))


FLOAT32 = Recipe(nnx.Linear)
"""What the others are compared with."""

RECIPES: dict[str, Recipe] = {
    "FakeQuant W8A8": _fake_quant(8),
    "FakeQuant W4A4": _fake_quant(4),
}
