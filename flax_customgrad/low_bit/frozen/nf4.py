"""NF4: the 16 levels of 4-bit NormalFloat, and scales that are quantized again.

    quantize    s[j, o]    = max |w[i, o]|  over the inputs i of block j
                code[i, o] = the level nearest to w[i, o] / s[j, o]; halfway, the lower one
    dequantize  w'[i, o]   = level[code[i, o]] s[j, o]

    double_quant: a scale takes 8 bits, in groups of 256, output by output
                l, u       = the least and the largest s of the group, zeros apart
                q[j, o]    = round(255 log(s[j, o] / l) / log(u / l))
                s'[j, o]   = l (u / l)^(q[j, o] / 255)

The levels are quantiles of the normal distribution, scaled to [-1, 1], and hold an exact 0. Codes
are found with the scales as they are, before those are quantized. What the paper calls an 8-bit
float and bitsandbytes stores by a table of its own are logarithms here: a scale is wrong in
proportion to itself, by 0.2 % where the largest scale of its group is 3 times the least, and by
1.4 % where it is 1000 times that. In steps of equal size, as in torchao, one outlier would round
the others of its group to zero. With 64 weights to a block a weight takes 4.5 bits with scales in
float32, and 4.13 bits where they are quantized.

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
from flax_customgrad.numerics.sharding import explicit_spec, with_auto_axes

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
"""How many scales share a range."""


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
        return ("codes", "scales", *(("scale_range",) if self.double_quant else ()))

    @compiled
    def quantize(self, w: jax.Array) -> dict[str, jax.Array]:
        """Stores a kernel.

        Args:
            w: array of shape (n, m), float.

        Returns:
            `codes`, uint8 of shape (n, ceil(m / 2)), two to a byte, and `scales` of shape
            (ceil(n / block), m) in the dtype of w. With `double_quant` the scales are uint8, beside
            `scale_range` of shape (ceil(m ceil(n / block) / 256), 2) in that dtype.
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
        dtype = stored["scale_range" if self.double_quant else "scales"].dtype
        if self.double_quant:
            # Groups cross the outputs, which a mesh may have split.
            scales = with_auto_axes(
                _dequantize_scales, explicit_spec(scales), scales, stored["scale_range"]
            )
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
    rows = _in_groups(scales)
    # A block of zeros needs no scale, and one without normal digits has no logarithm.
    counts = rows >= float(jnp.finfo(scales.dtype).tiny)
    least = jnp.min(rows, 1, where=counts, initial=jnp.inf)
    largest = jnp.max(rows, 1, where=counts, initial=0)
    ends = jnp.stack([jnp.where(largest == 0, 1, least), jnp.where(largest == 0, 1, largest)], 1)
    ends = jnp.clip(ends, float(jnp.finfo(dtype).smallest_subnormal), float(jnp.finfo(dtype).max))
    ends = jnp.where(jnp.all(jnp.isfinite(rows), 1, keepdims=True), ends, jnp.nan).astype(dtype)
    low, width = _logarithms(ends, scales.dtype)
    place = (jnp.log2(jnp.where(counts, rows, 1)) - low) / jnp.where(width == 0, 1, width)
    codes = jnp.where(counts, jnp.clip(jnp.round(255 * place), 0, 255), 0).astype(jnp.uint8)
    return {"scales": _out_of_groups(codes, scales.shape), "scale_range": ends}


def _dequantize_scales(codes: jax.Array, ends: jax.Array) -> jax.Array:
    (wide,) = widened(ends.dtype, ends)
    least, largest = wide[:, :1], wide[:, 1:]
    _, width = _logarithms(ends, wide.dtype)
    # In halves, which do not overflow.
    half = jnp.exp2(_in_groups(codes).astype(wide.dtype) * (width * (0.5 / 255)))
    return _out_of_groups(jnp.clip(least * half * half, least, largest), codes.shape)


def _logarithms(ends: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the least scale of each group, and how far that of the largest is away."""
    logs = jnp.log2(ends.astype(dtype))
    return logs[:, :1], logs[:, 1:] - logs[:, :1]


def _in_groups(scales: jax.Array) -> jax.Array:
    """Scales of shape (blocks, m), output by output: of shape (groups, GROUP), with zeros last."""
    flat = scales.T.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % GROUP)).reshape(-1, GROUP)


def _out_of_groups(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The scales of shape (blocks, m) that `_in_groups` has put in groups."""
    blocks, m = shape
    return rows.reshape(-1)[: blocks * m].reshape(m, blocks).T
