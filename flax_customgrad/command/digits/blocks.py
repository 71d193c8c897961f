"""Hidden blocks whose gradient passes or is set to zero, for a network and its control."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.estimators.rounding.sign import SteSign
from flax_customgrad.gradients.shaping.scale import gradient_scale
from flax_customgrad.layers.normalization.batch_norm import BatchNorm

WIDTH = 48
"""How many features a hidden block has: few, so that random ones classify few images."""


class GradientGate(nnx.Variable):
    """1 where the gradient passes through a block, 0 in the control."""


class AuxiliaryLoss(nnx.Variable):
    """What a block adds to the loss, such as the commitment to a codebook."""


class Block(nnx.Module):
    """A hidden block with a gate for its gradient and a loss of its own."""

    def __init__(self):
        self.gate = GradientGate(jnp.ones(()))
        self.loss = AuxiliaryLoss(jnp.zeros(()))

    def gate_gradient(self, x: jax.Array) -> jax.Array:
        """Returns x, with its gradient multiplied by the gate."""
        return gradient_scale(x, self.gate[...])


MakeBlock = Callable[[int, int, nnx.Rngs], Block]
"""Makes a block from how many features come in and go out."""


class ActivationBlock(Block):
    """A linear layer, batch normalization, and a step function of the features.

    Args:
        step: takes and returns an array of shape (n, out_features); or returns with it what to add
            to the loss.
        linear: the class of the linear layer.
        in_features: how many features come in.
        out_features: how many go out.
        rngs: the streams.
    """

    def __init__(
        self,
        step: Callable[[jax.Array], Any],
        linear: Callable[..., nnx.Module],
        in_features: int,
        out_features: int,
        rngs: nnx.Rngs,
    ):
        super().__init__()
        self.linear = linear(in_features, out_features, use_bias=False, rngs=rngs)
        self.norm = BatchNorm(out_features, momentum=0.9, rngs=rngs)
        self.step = step

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps features of shape (n, in_features) to features of shape (n, out_features)."""
        y = self.step(self.norm(self.linear(x)))  # type: ignore[operator]
        if isinstance(y, tuple):
            y, self.loss[...] = y
        return self.gate_gradient(y)


class WeightBlock(Block):
    """A step function of the weights of a linear layer, and the sign of its features.

    Args:
        step: takes and returns an array of shape (in_features, out_features).
        in_features: how many features come in.
        out_features: how many go out.
        rngs: the streams.
    """

    def __init__(
        self,
        step: Callable[[jax.Array], jax.Array],
        in_features: int,
        out_features: int,
        rngs: nnx.Rngs,
    ):
        super().__init__()
        shape = (in_features, out_features)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
        # Without a scale and a bias, by which the control would learn after all.
        self.norm = BatchNorm(
            out_features, momentum=0.9, use_scale=False, use_bias=False, rngs=rngs
        )
        self.step = step
        self.sign = SteSign()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps features of shape (n, in_features) to features of shape (n, out_features)."""
        return self.sign(self.norm(x @ self.gate_gradient(self.step(self.kernel[...]))))
