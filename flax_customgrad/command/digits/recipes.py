"""Networks with quantized layers: one for each recipe, with two quantized hidden layers.

The first and the last layer are in float32, as is usual. Each quantized layer is followed by batch
normalization and a ReLU.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from flax_customgrad.command.digits.blocks import ActivationBlock
from flax_customgrad.command.digits.data import CLASSES, PIXELS
from flax_customgrad.layers.normalization.batch_norm import BatchNorm
from flax_customgrad.low_bit.fp8.fp8_linear import Fp8Linear
from flax_customgrad.low_bit.int8.int8_linear import Int8Linear
from flax_customgrad.low_bit.microscaling.mx_linear import MXLinear
from flax_customgrad.low_bit.microscaling.nvfp4_linear import NVFP4Linear
from flax_customgrad.low_bit.quant_layers.binary_layers import BinaryLinear
from flax_customgrad.low_bit.quant_layers.bit_linear import BitLinear
from flax_customgrad.low_bit.quant_layers.quant_linear import QuantLinear
from flax_customgrad.low_bit.quant_layers.ternary_layers import TernaryLinear
from flax_customgrad.low_bit.quantizers.dorefa import DoReFaActivation, DoReFaWeight
from flax_customgrad.low_bit.quantizers.ewgs import EWGS
from flax_customgrad.low_bit.quantizers.fake_quant import FakeQuant
from flax_customgrad.low_bit.quantizers.gradient_quant import DoReFaGradient, GradientQuant
from flax_customgrad.low_bit.quantizers.lsq import LSQ
from flax_customgrad.low_bit.quantizers.lsq_plus import LSQPlus
from flax_customgrad.low_bit.quantizers.pact import PACT
from flax_customgrad.low_bit.quantizers.tqt import TQT
from flax_customgrad.low_bit.quantizers.ttq import TTQ

_WIDTH = 64


@dataclass(frozen=True)
class TrainingRecipe:
    """A way to quantize the hidden layers of a network.

    Attributes:
        linear: makes a hidden layer, as `nnx.Linear` is made.
        tolerance: how many points it may be less accurate than the network in float32.
        activation: what stands between two layers.
        vmap_seeds: whether networks of several seeds can be trained in one program.
    """

    linear: Callable[..., nnx.Module]
    tolerance: float = 1.0
    activation: Callable[[jax.Array], jax.Array] = nnx.relu
    vmap_seeds: bool = True

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the network."""
        hidden = functools.partial(ActivationBlock, self.activation, self.linear, _WIDTH, _WIDTH)
        return nnx.Sequential(
            nnx.Linear(PIXELS, _WIDTH, use_bias=False, rngs=rngs),
            BatchNorm(_WIDTH, momentum=0.9, rngs=rngs),
            self.activation,
            hidden(rngs),
            hidden(rngs),
            nnx.Linear(_WIDTH, CLASSES, rngs=rngs),
        )


def _identity(x: jax.Array) -> jax.Array:
    return x


def _quantized(
    weight: Callable[[], Any] | None = None,
    activation: Callable[[], Any] | None = None,
    gradient: Callable[[nnx.Rngs], Any] | None = None,
    *,
    between: Callable[[jax.Array], jax.Array] = nnx.relu,
) -> TrainingRecipe:
    """Layers whose quantizers are made anew for each."""

    def linear(*features: int, rngs: nnx.Rngs, **kwargs: Any) -> nnx.Module:
        return QuantLinear(
            *features,
            weight=weight and weight(),
            activation=activation and activation(),
            gradient=gradient and gradient(rngs),
            rngs=rngs,
            **kwargs,
        )

    return TrainingRecipe(linear, activation=between)


def _fake_quant(bits: int, gradient: Callable[[nnx.Rngs], Any] | None = None) -> TrainingRecipe:
    return _quantized(lambda: FakeQuant(bits, axis=-1), lambda: FakeQuant(bits), gradient)


def _lsq(bits: int, cls: type[LSQ] = LSQ) -> TrainingRecipe:
    return _quantized(lambda: LSQ(bits), lambda: cls(bits, signed=False, features=1))


def _signed_or_not(cls: Callable[..., Any], bits: int) -> TrainingRecipe:
    return _quantized(lambda: cls(bits), lambda: cls(bits, signed=False))


FLOAT32 = TrainingRecipe(nnx.Linear)
"""What the others are compared with."""

RECIPES: dict[str, TrainingRecipe] = {
    "FakeQuant W8A8": _fake_quant(8),
    "FakeQuant W4A4": _fake_quant(4),
    "FakeQuant W8A8, gradient of 8 bits": _fake_quant(8, lambda rngs: GradientQuant(8, rngs=rngs)),
    "LSQ W8A8": _lsq(8),
    "LSQ W4A4": _lsq(4),
    "LSQ W2A2": _lsq(2),
    "LSQ W4, LSQ+ A4": _lsq(4, LSQPlus),
    "FakeQuant W4, PACT A4": _quantized(
        lambda: FakeQuant(4, axis=-1), lambda: PACT(4), between=_identity
    ),
    "DoReFa W4A4, gradient of 6 bits": _quantized(
        lambda: DoReFaWeight(4),
        lambda: DoReFaActivation(4),
        lambda rngs: DoReFaGradient(6, rngs=rngs),
    ),
    "TQT W4A4": _signed_or_not(TQT, 4),
    "EWGS W4A4": _signed_or_not(EWGS, 4),
    "TTQ": _quantized(TTQ),
    "TernaryLinear": TrainingRecipe(TernaryLinear),
    "BitLinear": TrainingRecipe(BitLinear),
    "BinaryLinear": TrainingRecipe(BinaryLinear, tolerance=3.0, activation=_identity),
    "Int8Linear": TrainingRecipe(Int8Linear),
    "Int8Linear, backward in int8": TrainingRecipe(
        functools.partial(Int8Linear, backward="int8", stochastic_rounding=True)
    ),
    "Int8Linear, SwitchBack": TrainingRecipe(functools.partial(Int8Linear, backward="switchback")),
    "Fp8Linear, current scaling": TrainingRecipe(functools.partial(Fp8Linear, scaling="current")),
    "Fp8Linear, delayed scaling": TrainingRecipe(
        functools.partial(Fp8Linear, history=16), vmap_seeds=False
    ),
    "MXLinear, MXFP8": TrainingRecipe(MXLinear),
    "MXLinear, MXFP4": TrainingRecipe(functools.partial(MXLinear, format="mxfp4")),
    "NVFP4Linear": TrainingRecipe(NVFP4Linear),
}
