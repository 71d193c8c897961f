"""NVFP4: blocks with an 8-bit float for a scale, and one factor for all, arXiv:2509.25149.

    factor   a / (448 6),  a = max |x| over the whole array
    scale    E4M3(b / 6 / factor) = E4M3(448 b / a),  b = max |x| over the block; at least 2^-9
    element  E2M1(x / factor / scale)
    value    element scale factor,  at most a

The factor brings the scales into the range of E4M3, and the scales bring the elements into that of
E2M1. x is divided by a power of two near a first, exactly; the quotients are rounded once, so that
ties of data in half precision are ties here. An infinite or NaN element makes everything NaN, by
way of the factor. Where a scale is rounded down, by up to 1/17, the largest elements of its block
saturate. A block whose largest element is below a 2^-18 comes out with few digits, or 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.low_bit.microscaling.scaled_blocks import Format, Scaled, places, split
from flax_customgrad.low_bit.microscaling.small_floats import (
    E2M1,
    E4M3,
    decode,
    encode,
    octave,
    round_to,
)

_SMALLEST, _LARGEST = 2.0**-9, 448.0
# Elements times scales are at most 448 6 = 21 2^7. Values are below 2^12, whose power is divided
# out of them and put into the factor: neither overflows.
_POWER = 2.0**11
# A power of two whose inverse is a normal number of float32 too.
_NORMAL = 2.0**125


@dataclass(frozen=True)
class NVFP4(Format):
    """The format of NVIDIA's Blackwell."""

    element: Any = E2M1
    size: int = 16

    def quantize(self, x: jax.Array, axes: Sequence[int], noise: jax.Array | None = None) -> Scaled:
        """Scales blocks and rounds them to elements."""
        largest = jnp.max(jnp.abs(x), initial=0)
        power = jnp.clip(octave(largest), 1 / _NORMAL, _NORMAL)
        a = jnp.where(largest == 0, 1, jnp.where(jnp.isfinite(largest), largest / power, jnp.nan))
        blocks = split(x / power, axes, self.size)
        b = jnp.max(jnp.abs(blocks), places(axes), keepdims=True)
        scales = jnp.maximum(round_to(E4M3, _LARGEST * b / a), _SMALLEST)
        random = None if noise is None else split(noise, axes, self.size)
        most = _LARGEST * float(jnp.finfo(E2M1).max)
        elements = round_to(E2M1, most * blocks / (a * scales), random)
        return Scaled(elements, encode(E4M3, scales), _POWER / most * a * power)

    def values(self, scaled: Scaled) -> jax.Array:
        """What elements and scales stand for, in blocks."""
        assert scaled.factor is not None
        scales = decode(E4M3, scaled.scales, scaled.elements.dtype)
        return scaled.elements * (scales / _POWER) * scaled.factor
