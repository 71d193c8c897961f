"""NF4: the 16 levels of 4-bit NormalFloat, and scales that are quantized again.

    quantize    s[j, o]    = max |w[i, o]|  over the inputs i of block j
                code[i, o] = the level nearest to w[i, o] / s[j, o]; halfway, the lower one
    dequantize  w'[i, o]   = level[code[i, o]] s[j, o]

    double_quant: a scale takes 8 bits, in groups k of 256 outputs
                m          = mean of all s
                t[j, k]    = max |s[j, o] - m| / 127  over the outputs o of group k
                q[j, o]    = round((s[j, o] - m) / t[j, k]), halves to the even one
                s'[j, o]   = max(m + q[j, o] t[j, k], 0)

The levels are quantiles of the normal distribution, scaled to [-1, 1], and hold an exact 0. Codes
are found with the scales as they are, before those are quantized. What the paper calls an 8-bit
float and bitsandbytes stores by a table of its own is an 8-bit integer here, as in torchao, and the
largest deviation of a group is exact. With 64 weights to a block a weight takes 4.5 bits with
scales in float32, and 4.13 bits where they are quantized.

No scale is negative: one far below the mean would else come out below zero and turn the signs of
its block around. Nor is one beyond the largest number.

Source: arXiv:2305.14314
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.frozen.kernel_blocks import (
    compiled,
    quotient_or_zero,
    repeat_per_weight,
    split_kernel,
)
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.packing import pack_bits, unpack_bits

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The levels, appendix E of arXiv:2305.14314."""

GROUP = 256
"""How many outputs share the scale of their scales."""


@dataclass(frozen=True)
class NF4:
    """How a kernel is stored in NF4.

    Attributes:
        block: how many weights of an output, along the inputs, share a scale.
        double_quant: whether the scales are quantized as well.
    """

    block: int = 64
    double_quant: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the arrays that are stored."""
        return ("codes", "scales", *(("scale_steps", "scale_mean") if self.double_quant else ()))

    @compiled
    def quantize(self, w: jax.Array) -> dict[str, jax.Array]:
        """Stores a kernel.

        Args:
            w: array of shape (n, m), float.

        Returns:
            `codes`, uint8 of shape (n, ceil(m / 2)), two to a byte, and `scales` of shape
            (ceil(n / block), m) in the dtype of w. With `double_quant` the scales are int8, beside
            `scale_steps` of shape (ceil(n / block), ceil(m / 256)) and `scale_mean`, a number, in
            that dtype.
        """
        (wide,) = widened(w.dtype, w)
        scales = jnp.max(jnp.abs(split_kernel(wide, self.block)), axis=1)
        codes = pack_bits(
            _nearest(quotient_or_zero(wide, repeat_per_weight(scales, self.block, w.shape[0]))), 4
        )
        if not self.double_quant:
            return {"codes": codes, "scales": scales.astype(w.dtype)}
        return {"codes": codes, **_quantize_scales(scales, w.dtype)}

    @compiled
    def dequantize(self, stored: Parameters) -> jax.Array:
        """The kernel that is stored.

        Args:
            stored: what `quantize` returned.

        Returns:
            Array of shape (n, m), in the dtype of the kernel before.
        """
        codes, scales = stored["codes"], stored["scales"]
        dtype = stored["scale_mean" if self.double_quant else "scales"].dtype
        if self.double_quant:
            scales = _dequantize_scales(scales, stored["scale_steps"], stored["scale_mean"])
        (scales,) = widened(dtype, scales)
        levels = _level(unpack_bits(codes, 4, scales.shape[1]), scales.dtype)
        return (levels * repeat_per_weight(scales, self.block, codes.shape[0])).astype(dtype)


def _nearest(v: jax.Array) -> jax.Array:
    """The code of the nearest level: how many of the 15 midpoints lie below."""
    levels = np.asarray(LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = jnp.zeros_like(v, jnp.uint8)
    for midpoint in midpoints.astype(v.dtype):
        codes += v > midpoint
    return codes


def _level(codes: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    # Not LEVELS[codes]: a choice is elementwise, so that XLA fuses it and a mesh may split it.
    which = codes.astype(jnp.int32)
    return lax.select_n(which, *(jnp.full_like(which, level, dtype) for level in LEVELS))


def _quantize_scales(scales: jax.Array, dtype: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    # Not the sum over their number, which overflows.
    mean = jnp.sum(scales / scales.size).astype(dtype)
    deviation = scales - mean.astype(scales.dtype)
    # In groups along the outputs, as weights are in blocks along the inputs.
    steps = (jnp.max(jnp.abs(split_kernel(deviation.T, GROUP)), axis=1).T / 127).astype(dtype)
    each = repeat_per_weight(steps.T, GROUP, scales.shape[1]).T.astype(scales.dtype)
    codes = jnp.clip(jnp.round(quotient_or_zero(deviation, each)), -127, 127)
    return {"scales": codes.astype(jnp.int8), "scale_steps": steps, "scale_mean": mean}


def _dequantize_scales(codes: jax.Array, steps: jax.Array, mean: jax.Array) -> jax.Array:
    dtype = mean.dtype
    steps, mean = widened(dtype, steps, mean)
    each = repeat_per_weight(steps.T, GROUP, codes.shape[1]).T
    return jnp.clip(mean + codes.astype(each.dtype) * each, 0, float(jnp.finfo(dtype).max))
