"""LSQ+: integers in units of a learned scale, plus a learned offset, arXiv:2004.09576.

    forward   y  = s clip(round(v), low, high) + b,   v = (x - b) / s,   s = max(|p|, least)
    backward  dx = g where low <= v <= high, else 0
              ds = G sum of g {round(v) - v inside, low, high},   dp = sign(p) ds
              db = G sum of g {0 inside, 1 outside}
              G  = 1 / sqrt(N high)
    kept      x, p and b

p and N are those of `LSQ`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.low_bit.quantizers.calibration import Axis
from flax_customgrad.low_bit.quantizers.codes import Codes, to_codes
from flax_customgrad.low_bit.quantizers.lsq import (
    LSQ,
    LSQScheme,
    learned_parameter,
    set_learned_parameter,
)
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.broadcasting import sum_to_shape


@dataclass(frozen=True)
class LSQPlusScheme(LSQScheme):
    """Integers in units of the scale s, plus the offset b; the parameters are p and b."""

    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The nearest integer to (x - b) / s in [low, high]."""
        p, b = parameters
        return super().encode(x - b, p)

    def decode(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The integers times s, plus b."""
        p, b = parameters
        # The minimum changes nothing but the rounding: XLA cannot fuse the product with the sum.
        most = super().decode(jnp.asarray(self.high, q.dtype), p)
        return jnp.minimum(super().decode(q, p), most) + b

    def zero_point(self, *parameters: jax.Array) -> jax.Array | int | None:
        """None: the offset is no multiple of s."""
        return None

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[Any, ...]:
        """The cotangents of x, p and b."""
        x, p, b = kept
        dx, dp = super().cotangents(g, x - b, p)
        return dx, dp, self.gain(x.shape, b) * sum_to_shape(g - dx, b.shape)


class LSQPlus(LSQ):
    """LSQ with an offset that trains too, for activations that are not centred.

    Attributes:
        scale: the learned scale, or scales; float32. `observe` spreads the integers from the least
            to the largest value.
        offset: the value of the integer 0, learned; float32. It is 0 until `observe` sets it, and
            with an axis None.

    Args:
        bits: from 2 to 16.
        signed: whether the integers are -2^(bits-1) to 2^(bits-1) - 1, or 0 to 2^bits - 1.
        axis: the axes along which each index has a scale and an offset of its own; None for one.
        features: how many of the last axes are the features of an activation: 1, or 3 for images.
            None for weights, where every element counts.
        grad_scale: what both gradients are multiplied by: "lsq" for 1 / sqrt(N high), or a number.

    Raises:
        ValueError: `bits` is not from 2 to 16, `axis` is "token", `features` is not a positive
            integer, or `grad_scale` is a word other than "lsq".

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> quantizer = fcg.LSQPlus(bits=2, signed=False)
        >>> quantizer.observe(jnp.array([-0.5, 0.0, 2.5]))
        >>> quantizer.scale[...], quantizer.offset[...]
        (Array(1., dtype=float32), Array(-0.5, dtype=float32))
        >>> quantizer(jnp.array([-0.4, 0.1, 1.4]))
        Array([-0.5,  0.5,  1.5], dtype=float32)

    Source: arXiv:2004.09576
    """

    def __init__(
        self,
        bits: int = 8,
        *,
        signed: bool = True,
        axis: Axis = None,
        features: int | None = None,
        grad_scale: Literal["lsq"] | float = "lsq",
    ):
        super().__init__(bits, signed=signed, axis=axis, features=features, grad_scale=grad_scale)
        self.offset = nnx.Param(jnp.zeros(self.scale.shape))

    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes an array; returns the values and their codes.

        Args:
            x: array of any shape, float.

        Raises:
            ValueError: the scales have not been set yet, or do not fit the shape of x.
        """
        x = jnp.asarray(x)
        parameters = learned_parameter(self, "scale", x), learned_parameter(self, "offset", x)
        return to_codes(x, parameters, self._scheme(LSQPlusScheme))

    def observe(self, x: jax.Array) -> None:
        """Spreads the integers over the values of an array; what is not finite is left out.

        Args:
            x: array of any shape, float, like those to come.
        """
        wide = lax.stop_gradient(x).astype(accumulator(x))
        wide, axes = self.granularity.grouped(wide)
        finite = {"where": jnp.isfinite(wide), "axis": axes, "keepdims": True}
        least = jnp.min(wide, initial=jnp.inf, **finite)
        largest = jnp.max(wide, initial=-jnp.inf, **finite)
        low, high = self.integers
        # Halves, whose difference does not overflow.
        scale = (largest / 2 - least / 2) * (2 / (high - low))
        least = jnp.where(largest >= least, least, 0)
        # The range of a constant is empty. It becomes the offset, and the range as wide as it is.
        of_constant = jnp.where(least == 0, 1, jnp.abs(least) * (1 / (high - low)))
        offset = jnp.where(scale > 0, least - low * scale, least)
        set_learned_parameter(self, "scale", jnp.where(scale > 0, scale, of_constant))
        set_learned_parameter(self, "offset", offset)
