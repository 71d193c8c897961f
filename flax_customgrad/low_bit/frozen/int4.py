"""INT4: 4-bit integers with one scale to a block, symmetric or with a zero point.

    symmetric   s[j, o]    = max |w[i, o]| / 7  over the inputs i of block j
                code[i, o] = 8 + clip(round(w[i, o] / s[j, o]), -7, 7)
                w'[i, o]   = (code[i, o] - 8) s[j, o]

    affine      low, high  = min(w[i, o], 0), max(w[i, o], 0)  over block j
                s[j, o]    = (high - low) / 15
                z[j, o]    = round(-low / s[j, o])
                code[i, o] = clip(z[j, o] + round(w[i, o] / s[j, o]), 0, 15)
                w'[i, o]   = (code[i, o] - z[j, o]) s[j, o]

`round` takes halves to the even integer. Codes are found with the scales as they are stored, in the
dtype of the weights. A weight of zero stays zero. The code 0 of the symmetric form, -8, is not
used: a scale of max |w| / 7.5 (torchao, qwix) or max |w| / 8 uses it, and clips the largest weight
in return.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.frozen.kernel_blocks import (
    compiled,
    quotient_or_zero,
    repeat_per_weight,
    split_kernel,
)
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.packing import pack_bits, unpack_bits


@dataclass(frozen=True)
class Int4:
    """How a kernel is stored in 4-bit integers.

    Attributes:
        block: how many weights of an output, along the inputs, share a scale; None for all.
        symmetric: whether the zero point is in the middle; otherwise each block has one.
    """

    block: int | None = 128
    symmetric: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the arrays that are stored."""
        return ("codes", "scales", *(() if self.symmetric else ("zeros",)))

    @compiled
    def quantize(self, w: jax.Array) -> dict[str, jax.Array]:
        """Stores a kernel.

        Args:
            w: array of shape (n, m), float.

        Returns:
            `codes`, uint8 of shape (n, ceil(m / 2)), two to a byte; `scales` of shape
            (ceil(n / block), m) in the dtype of w; unless symmetric `zeros`, the zero points,
            uint8 of shape (ceil(n / block), ceil(m / 2)), two to a byte.
        """
        n, block = w.shape[0], self._block(w.shape[0])
        (wide,) = widened(w.dtype, w)
        blocks = split_kernel(wide, block)
        low, high = jnp.min(blocks, 1, initial=0), jnp.max(blocks, 1, initial=0)
        largest = jnp.maximum(-low, high)
        # Not (high - low) / 15, which overflows.
        steps = largest / 7 if self.symmetric else high / 15 - low / 15
        # Not infinity: what `dequantize` brings back into the range of a dtype was never beyond.
        scales = jnp.where(jnp.isfinite(largest), steps, jnp.nan).astype(w.dtype)
        # Among the last digits of float16 a scale that is rounded down clips, to zero even.
        too_small = (scales < steps) & (steps < float(jnp.finfo(w.dtype).tiny))
        scales = jnp.where(too_small, jnp.nextafter(scales, jnp.ones_like(scales)), scales)
        each = scales.astype(wide.dtype)
        rounded = jnp.round(quotient_or_zero(wide, repeat_per_weight(each, block, n)))
        if self.symmetric:
            return {"codes": pack_bits(jnp.clip(rounded, -7, 7) + 8, 4), "scales": scales}
        zeros = jnp.clip(jnp.round(quotient_or_zero(-low, each)), 0, 15)
        codes = jnp.clip(rounded + repeat_per_weight(zeros, block, n), 0, 15)
        return {"codes": pack_bits(codes, 4), "scales": scales, "zeros": pack_bits(zeros, 4)}

    @compiled
    def dequantize(self, stored: Parameters) -> jax.Array:
        """The kernel that is stored.

        Args:
            stored: what `quantize` returned.

        Returns:
            Array of shape (n, m), in the dtype of the scales.
        """
        n, m, dtype = stored["codes"].shape[0], stored["scales"].shape[1], stored["scales"].dtype
        (scales,), block = widened(dtype, stored["scales"]), self._block(n)
        zeros = (
            8 if self.symmetric else repeat_per_weight(unpack_bits(stored["zeros"], 4, m), block, n)
        )
        steps = unpack_bits(stored["codes"], 4, m).astype(jnp.int8) - jnp.int8(zeros)
        most = float(jnp.finfo(dtype).max)
        return jnp.clip(steps * repeat_per_weight(scales, block, n), -most, most).astype(dtype)

    def _block(self, n: int) -> int:
        return n if self.block is None else self.block
