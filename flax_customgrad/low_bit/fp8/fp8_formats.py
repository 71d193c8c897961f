"""The 8-bit floats and their scales, arXiv:2209.05433.

    code   = round(clip(x / s, -max, max))       to the nearest, halves to the even one
    value  = code s
    s      = amax / (max 2^-margin),  amax = max |x|

    E4M3   3 bits of mantissa, max 448:    inputs and kernels
    E5M2   2 bits of mantissa, max 57344:  gradients

What is too large becomes the largest value. What is not finite does not become a finite code: E4M3
makes it nan. The arithmetic is in float32, for half precision too, where flax.linen.fp8_ops divides
in half precision and rounds twice; in float32 the codes and scales are its own, bit for bit.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_customgrad.numerics.accumulation import accumulator

_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Format:
    """An 8-bit float.

    Attributes:
        dtype: its dtype.
        max: its largest value.
    """

    dtype: Any
    max: float

    def encode(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """The codes of an array, in the dtype of the format.

        Args:
            x: array of any shape, float.
            scale: float array without axes, positive.
        """
        wide = accumulator(x)
        scaled = x.astype(wide) / scale.astype(wide)
        # What is finite saturates, also where x / s is not.
        saturated = jnp.clip(scaled, -self.max, self.max)
        # XLA rounds float64 to half precision on its way to 8 bits.
        return jnp.where(jnp.isfinite(x), saturated, scaled).astype(jnp.float32).astype(self.dtype)


E4M3 = Format(jnp.float8_e4m3fn, 448.0)
E5M2 = Format(jnp.float8_e5m2, 57344.0)


def amax(x: jax.Array) -> jax.Array:
    """The largest finite magnitude, an array without axes; 0 where there is none.

    Args:
        x: array of any shape, float.

    Returns:
        float32, or float64 for float64.
    """
    finite = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)
    return jnp.max(finite, initial=0).astype(accumulator(x))


def scale_of(amax: jax.Array, max: Any, otherwise: Any, margin: int) -> jax.Array:
    """The scale that takes amax to the largest value of a format, or margin halvings below it.

    Args:
        amax: float32 or float64 array of any shape.
        max: the largest value of the format; of a shape that broadcasts.
        otherwise: the scale where amax is 0 or not finite.
        margin: how many halvings of the range are left unused.

    Returns:
        Array like amax, positive.
    """
    usable = (amax > 0) & jnp.isfinite(amax)
    # As flax.linen divides, and in steps that XLA does not merge.
    inverse = jnp.where(usable, max / amax / 2.0**margin, 1)
    # An amax of 1e-37 asks for a scale that float32 has not.
    return jnp.where(usable, jnp.maximum(1 / inverse, _TINY), otherwise)
