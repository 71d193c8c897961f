"""Calibration: the range that an array is quantized in, and its scale.

    symmetric   s = a / high                        a = max |x|, or a percentile of |x|
    affine      s = (b - a) / (high - low)          a = min(x, 0), b = max(x, 0), or percentiles
                z = round(-a / s)                   the integer of 0, which has no error

The range is of the whole array, of each channel, or of each block, in float32 or wider; it has no
gradient. Where it is empty the scale is 1, so that zeros stay zeros. A NaN or an infinity makes the
range non-finite, and with it all values that share the range; a range that is recorded for other
arrays leaves them out. Where the devices of a `shard_map` hold parts of what shares a range, it is
that of all parts.

Where a divisor is a constant, its inverse is a factor: XLA replaces such a division in some
programs and not in others, and codes would depend on what is compiled with them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_size, check_word, integers
from flax_customgrad.numerics.broadcasting import broadcasts
from flax_customgrad.numerics.scaling import magnitude
from flax_customgrad.numerics.sharding import AxisName

Axis = int | Sequence[int] | Literal["token"] | None


class Range(NamedTuple):
    """The smallest and the largest value: float32 arrays, or wider, one element for each range."""

    low: jax.Array
    high: jax.Array


@dataclass(frozen=True)
class Granularity:
    """Which elements share a range.

    Attributes:
        axis: the axes along which each index has a range of its own; "token" for all but the last
            one; None for one range. With a block the one axis along which blocks lie.
        block: how many neighbours along the axis share a range, each index of every other axis
            apart; None for no blocks. The last block may be shorter.
        axis_name: the axis of a `shard_map`, `pmap` or `vmap` over which arrays are parts that
            share their ranges; None where each array is whole.
    """

    axis: tuple[int, ...] | Literal["token"] | None
    block: int | None = None
    axis_name: AxisName = None

    def grouped(self, x: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """The array, reshaped into blocks where there are any, and the axes that share a range."""
        own = (-1,) if self.axis == "token" else self.axis or ()
        if not all(-x.ndim <= axis < x.ndim for axis in own):
            raise ValueError(
                f"a quantizer's axis={own} does not exist in an array of shape {x.shape}"
            )
        if self.block is not None:
            assert isinstance(self.axis, tuple)
            axis = self.axis[0] % x.ndim
            n = x.shape[axis]
            pads = [(0, -n % self.block if i == axis else 0) for i in range(x.ndim)]
            shape = (*x.shape[:axis], -(-n // self.block), self.block, *x.shape[axis + 1 :])
            return jnp.pad(x, pads).reshape(shape), (axis + 1,)
        if self.axis is None:
            return x, tuple(range(x.ndim))
        if self.axis == "token":
            return x, (x.ndim - 1,)
        own = [axis % x.ndim for axis in self.axis]
        return x, tuple(axis for axis in range(x.ndim) if axis not in own)

    @property
    def is_per_example(self) -> bool:
        """Whether each example, token or block of an activation has a range of its own.

        Such a range belongs to its array: there is none to record for arrays to come.
        """
        return self.axis == "token" or self.block is not None or 0 in (self.axis or ())

    def fits(self, shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
        """Whether parameters of one shape, one for each range, fit an array of another."""
        if self.block is None or not shape:
            return broadcasts(shape, to)
        assert isinstance(self.axis, tuple)
        axis = self.axis[0] % len(to)
        return shape == (*to[:axis], -(-to[axis] // self.block), *to[axis + 1 :])

    def for_any_rank(self, parameter: jax.Array) -> jax.Array:
        """A parameter without the axes in front of those that are counted from the end.

        It then fits arrays of any rank.
        """
        own = self.axis if isinstance(self.axis, tuple) and self.block is None else ()
        return (
            parameter.reshape(parameter.shape[min(own) :]) if max(own, default=0) < 0 else parameter
        )

    def stack_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of a stack in front of a parameter, which is empty where it is not set yet."""
        if self.axis is None:
            return shape
        own = self.axis if isinstance(self.axis, tuple) else ()
        if 0 in shape:
            return shape[:-1]
        # Axes that are counted from the front do not say how many axes there are.
        return shape[: min(own)] if max(own, default=0) < 0 else ()

    def spread(self, parameter: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """One parameter for each range, repeated so that it broadcasts to an array of a shape."""
        if self.block is None or not parameter.ndim:
            return parameter
        assert isinstance(self.axis, tuple)
        axis = self.axis[0] % len(shape)
        repeated = jnp.repeat(parameter, self.block, axis)
        return lax.slice_in_dim(repeated, 0, shape[axis], axis=axis)


def granularity_of(
    layer: str, axis: Axis, block: int | None = None, axis_name: AxisName = None
) -> Granularity:
    """The `Granularity` that the arguments of a quantizer describe.

    Args:
        layer: the name of the quantizer, for the errors.
        axis: the axes along which each index has a range of its own; "token"; or None.
        block: how many neighbours along the one axis share a range, or None.
        axis_name: the axis over which arrays are parts that share their ranges, or None.

    Raises:
        ValueError: `axis` is another word than "token", `block` is not a positive integer, or
            `axis` is not the one axis that it needs.
    """
    if isinstance(axis, str):
        check_word(layer, "axis", axis, ["token"])
    elif axis is not None:
        axis = integers(axis)
    if block is not None:
        block = check_size(layer, "block", block)
        if not isinstance(axis, tuple) or len(axis) != 1:
            raise ValueError(
                f"{layer}: block={block} needs the one axis along which blocks lie, such as "
                f"axis=0; got axis={axis!r}"
            )
    return Granularity(axis, block, axis_name)  # type: ignore[arg-type]


def measured_range(
    x: jax.Array,
    granularity: Granularity,
    symmetric: bool,
    percentile: float | None = None,
    *,
    only_finite: bool = False,
) -> Range:
    """The range of an array.

    Args:
        x: array of any shape, float.
        granularity: which elements share a range.
        symmetric: whether it lies around 0.
        percentile: how many percent of the values lie within, from 50 to 100; None for all.
        only_finite: whether infinities and NaN are left out; the range of nothing is then NaN.
    """
    x, axes = granularity.grouped(lax.stop_gradient(x).astype(accumulator(x)))
    axis_name = granularity.axis_name

    def upper(a: jax.Array) -> jax.Array:
        counts = jnp.isfinite(a) if only_finite else None
        if percentile is None or not a.size:
            # What is left out, or has no elements, has the end -infinity.
            end = jnp.max(a, axes, keepdims=True, initial=-jnp.inf, where=counts)
        else:
            end = _percentile_of(a, axes, percentile, counts, axis_name)
        if axis_name is not None:
            end = lax.pmax(end, axis_name)
        return jnp.where(end == -jnp.inf, jnp.nan if only_finite else 0, jnp.maximum(end, 0))

    if symmetric:
        high = upper(jnp.abs(x))
        low = -high
    else:
        low, high = -upper(-x), upper(x)
    # One range is a number, so that a recorded one fits arrays of any rank.
    shared = axes if granularity.axis is None or granularity.block is not None else ()
    return Range(lax.squeeze(low, shared), lax.squeeze(high, shared))


def _percentile_of(
    a: jax.Array,
    axes: tuple[int, ...],
    percent: float,
    counts: jax.Array | None,
    axis_name: AxisName,
) -> jax.Array:
    """A percentile over axes, as NumPy has it; the same in every program where all elements count.

    Args:
        a: array of any shape, float32 or wider.
        axes: the axes over which it is taken, which stay with size 1.
        percent: from 0 to 100.
        counts: which elements count, array of bool of that shape; None for all.
        axis_name: the axis over which arrays are parts of one, or None.
    """
    apart = [axis for axis in range(a.ndim) if axis not in axes]
    if counts is not None:
        a = jnp.where(counts, a, jnp.nan)
    rows = jnp.transpose(a, (*apart, *axes)).reshape(*(a.shape[axis] for axis in apart), -1)
    if axis_name is not None:
        rows = lax.all_gather(rows, axis_name, axis=rows.ndim - 1, tiled=True)
    rows = jnp.sort(rows)  # NaN last.
    n: Any = rows.shape[-1]
    if counts is not None:
        n = jnp.sum(~jnp.isnan(rows), -1, keepdims=True, dtype=a.dtype)
    index, part = divmod((n - 1) * (percent / 100), 1)
    index = jnp.broadcast_to(jnp.asarray(index, jnp.int32), (*rows.shape[:-1], 1))
    below = jnp.take_along_axis(rows, jnp.maximum(index, 0), -1)
    above = jnp.take_along_axis(rows, jnp.minimum(index + 1, rows.shape[-1] - 1), -1)
    above = jnp.where(part > 0, above, below)
    # The minimum changes nothing but the rounding: XLA cannot fuse the product with the sum.
    step = jnp.minimum(part * (above - below), above - below)
    found = jnp.where(above == below, below, below + step)
    if counts is None:
        found = jnp.where(jnp.isnan(rows[..., -1:]), jnp.nan, found)
    else:
        found = jnp.where(jnp.isnan(found), -jnp.inf, found)
    return found.reshape([1 if axis in axes else size for axis, size in enumerate(a.shape)])


def mean_magnitude(x: jax.Array, granularity: Granularity) -> jax.Array:
    """The mean of |x| over the elements that share it, without a derivative; 0 of no elements.

    Args:
        x: array of any shape, float.
        granularity: which elements share a mean; without blocks.
    """
    size, axes = granularity.grouped(jnp.abs(lax.stop_gradient(x).astype(accumulator(x))))
    n = math.prod(size.shape[axis] for axis in axes)
    power = magnitude(size, axes)
    mean = jnp.sum(size / power, axes, keepdims=True) * (1 / max(n, 1)) * power
    if granularity.axis_name is None:
        return mean
    return lax.psum(mean * (1 / lax.axis_size(granularity.axis_name)), granularity.axis_name)


def mean_where(x: jax.Array, where: jax.Array, granularity: Granularity) -> jax.Array:
    """The mean of some of the elements that share it; 0 where there are none.

    Args:
        x: array of any shape, float32 or wider.
        where: array of bool of that shape: which elements count.
        granularity: which elements share a mean; without blocks.
    """
    x, axes = granularity.grouped(jnp.where(where, x, 0))
    n = jnp.sum(where, axes, dtype=x.dtype, keepdims=True)
    power = magnitude(x, axes)
    mean = jnp.sum(x / power, axes, keepdims=True) / jnp.maximum(n, 1) * power
    if granularity.axis_name is None:
        return mean
    in_all = lax.psum(n, granularity.axis_name)
    return lax.psum(mean * (n / jnp.maximum(in_all, 1)), granularity.axis_name)


def scale_of(found: Range, low: int, high: int, symmetric: bool) -> tuple[jax.Array, ...]:
    """The scale of a range, and its zero point unless it is symmetric.

    Args:
        found: the range.
        low: the smallest integer.
        high: the largest integer.
        symmetric: whether the value 0 is the integer 0.

    Returns:
        The scale, and the zero point where there is one: arrays of the range's shape and dtype.
    """
    if symmetric:
        scale = found.high * (1 / high)
    else:
        # Halves, whose difference does not overflow.
        scale = (found.high / 2 - found.low / 2) * (2 / (high - low))
    scale = jnp.where(scale == 0, 1, scale)
    return (scale,) if symmetric else (scale, low + jnp.round(-found.low / scale))
