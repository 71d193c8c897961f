"""MX: blocks that share a power of two, arXiv:2310.10537.

    scale    2^e,  a = max |x| over the block,  c = the largest element
             up:    e = ceil(log2(a / c)),  so that nothing saturates
             down:  e = floor(log2 a) - floor(log2 c),  of the OCP specification 1.0; what lies
                    beyond c 2^e saturates: up to an eighth of E4M3's values, a quarter of E2M1's
    bounds   -126 <= e <= 127 - floor(log2 c)
    code     e + 127, E8M0; 255 for NaN
    element  x 2^-e, rounded

A block with an element that is infinite or NaN is NaN throughout. e is taken from the bits of a, so
that it is right beside powers of two as well, where a quotient's logarithm is not. Its bounds keep
scales and values normal, finite numbers of float32: values beyond saturate, and zeros have the
lowest scale. (The specification has 2^-127 too, which XLA takes for 0.)

Rounding up is what NVIDIA's TransformerEngine does (arXiv:2506.08027). Products of normal data are
28.5 dB above their error with E4M3 and scales rounded up, 27.4 dB rounded down; 16.2 and 16.0 dB
with E2M1. qwix rounds another exponent; its codes are not those of the specification.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.low_bit.microscaling.scaled_blocks import Format, Scaled, places, split
from flax_customgrad.low_bit.microscaling.small_floats import octave, round_to

_BIAS, _NAN, _LOWEST = 127, 255, -126
_MANTISSA = jnp.finfo(jnp.float32).nmant


@dataclass(frozen=True)
class MX(Format):
    """A format of the OCP specification.

    Attributes:
        element: the format of the elements.
        size: how many elements along an axis share a scale.
        up: whether the exponent of the scale is rounded up.
    """

    up: bool = True

    def quantize(self, x: jax.Array, axes: Sequence[int], noise: jax.Array | None = None) -> Scaled:
        """Scales blocks and rounds them to elements."""
        blocks = split(x, axes, self.size)
        exponent, finite = self._exponent(blocks, places(axes))
        random = None if noise is None else split(noise, axes, self.size)
        elements = round_to(self.element, blocks * _power(-exponent, x.dtype), random)
        scales = jnp.where(finite, exponent + _BIAS, _NAN).astype(jnp.uint8)
        return Scaled(elements, scales)

    def values(self, scaled: Scaled) -> jax.Array:
        """What elements and scales stand for, in blocks."""
        power = _power(scaled.scales.astype(jnp.int32) - _BIAS, scaled.elements.dtype)
        return scaled.elements * jnp.where(scaled.scales == _NAN, jnp.nan, power)

    @property
    def _largest(self) -> tuple[float, int]:
        """The largest element as f 2^e, 1 <= f < 2."""
        fraction, exponent = math.frexp(float(jnp.finfo(self.element).max))
        return 2 * fraction, exponent - 1

    def _exponent(self, blocks: jax.Array, along: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """The exponent of each scale, int32, and whether its block is finite."""
        a = jnp.max(jnp.abs(blocks), along, keepdims=True)
        fraction, places = self._largest
        below = jnp.clip(octave(a), 2.0 ** (places + _LOWEST), 2.0**_BIAS)
        e = _exponent(below) - places
        if self.up:
            e += a > fraction * below
        return jnp.minimum(e, _BIAS - places), jnp.isfinite(a)


def _power(exponent: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """2^exponent, exactly; from -126 to 127."""
    bits = (exponent + _BIAS).astype(jnp.uint32) << _MANTISSA
    return lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def _exponent(power: jax.Array) -> jax.Array:
    """What `_power` was called with, int32."""
    bits = lax.bitcast_convert_type(power.astype(jnp.float32), jnp.int32)
    return (bits >> _MANTISSA) - _BIAS
