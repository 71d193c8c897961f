"""8-bit floats: the codes of an array, and its scale.

    code    = round(clip(x / scale, -max, max))     to the nearest, halves to the even one
    value   = code scale
    scale   = amax / (max 2^-margin),  amax = max |x|

    E4M3    `float8_e4m3fn`, 3 bits of mantissa, max 448:    inputs and kernels
    E5M2    `float8_e5m2`, 2 bits of mantissa, max 57344:    gradients

What is too large becomes the largest value. What is not finite does not become a finite code: E4M3
makes it nan. The arithmetic is in float32, for half precision too, where flax.linen.fp8_ops divides
in half precision and rounds twice; in float32 the codes and scales are its own, bit for bit.

Source: arXiv:2209.05433
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.scaling import quotient

FORWARD_DTYPE = jnp.float8_e4m3fn
"""E4M3, of inputs and kernels."""
GRADIENT_DTYPE = jnp.float8_e5m2
"""E5M2, of gradients."""

_TINY = np.finfo(np.float32).tiny


def encode_fp8(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The codes of an array.

    Args:
        x: array of any shape, float.
        scale: float array without axes, positive.
        dtype: `FORWARD_DTYPE` or `GRADIENT_DTYPE`.

    Returns:
        Array of x's shape, in that dtype.
    """
    wide, largest = accumulator(x), largest_of(dtype)
    x = x.astype(wide)
    # Rounded once in every program, so that a packed kernel has the codes that others compute.
    # What is finite saturates, also where x / scale is not.
    saturated = jnp.clip(quotient(x, scale.astype(wide)), -largest, largest)
    # XLA rounds float64 to half precision on its way to 8 bits.
    return jnp.where(jnp.isfinite(x), saturated, x).astype(jnp.float32).astype(dtype)


def largest_of(dtype: Any) -> float:
    """The largest value of an 8-bit float: 448 or 57344.

    Args:
        dtype: `FORWARD_DTYPE` or `GRADIENT_DTYPE`.
    """
    return float(jnp.finfo(dtype).max)


def finite_amax(x: jax.Array) -> jax.Array:
    """The largest finite magnitude; 0 where there is none.

    Args:
        x: array of any shape, float.

    Returns:
        Array without axes, float32, or float64 for float64.
    """
    finite = jnp.where(jnp.isfinite(x), jnp.abs(x), 0)
    return jnp.max(finite, initial=0).astype(accumulator(x))


def scale_from_amax(amax: jax.Array, largest: Any, otherwise: Any, margin: int) -> jax.Array:
    """The scale that takes amax to the largest value of a dtype, or margin halvings below it.

    Args:
        amax: float32 or float64 array of any shape.
        largest: the largest value of the dtype; of a shape that broadcasts.
        otherwise: the scale where amax is 0 or not finite.
        margin: how many halvings of the range are left unused.

    Returns:
        Array like amax, positive.
    """
    usable = (amax > 0) & jnp.isfinite(amax)
    # As flax.linen divides, and in steps that XLA does not merge.
    inverse = jnp.where(usable, largest / amax / 2.0**margin, 1)
    # An amax of 1e-37 asks for a scale that float32 has not.
    return jnp.where(usable, jnp.maximum(1 / inverse, _TINY), otherwise)


def current_scale(x: jax.Array, margin: int) -> jax.Array:
    """The scale of an array in E4M3, from the array itself.

    Args:
        x: array of any shape, float.
        margin: how many halvings of the range are left unused.
    """
    return scale_from_amax(finite_amax(x), largest_of(FORWARD_DTYPE), 1, margin)


class Fp8Codes(NamedTuple):
    """A kernel in E4M3.

    Attributes:
        codes: the bits of its codes, uint8.
        scales: that of the kernel, of shape (1,); or those of x, of the kernel and of g, of shape
            (3,). float32 or wider.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def has_all_scales(self) -> bool:
        """Whether the scales of x and g are given too."""
        return self.scales.shape[-1] == 3

    @property
    def kernel_scale(self) -> jax.Array:
        """The scale of the kernel."""
        return self.scales[1 if self.has_all_scales else 0]
