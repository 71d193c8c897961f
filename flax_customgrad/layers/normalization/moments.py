"""`moments`: mean and variance that stay right where the textbook's formulas do not.

    shift      = mean(x)
    correction = mean(x - shift)                         what rounding left out of the shift
    variance   = mean((x - shift)^2) - correction^2
    rstd       = 1 / sqrt(variance + epsilon)
    x_hat      = ((x - shift) - correction) rstd

With a mean of 1e4 and a standard deviation of 1, `E[x^2] - E[x]^2` in float32 has no correct digit
(an error of 230 to 770 in the output, 1e7 in `dx`), `E[(x - shift)^2]` has three; this has all
seven. The correction stays apart from the shift because float32 cannot hold their sum.

Squares overflow from 1.8e19 on: `scaled_squares` has what is done about it. Only where the sum
itself overflows (3.4e38 in float32) is the result NaN. Devices may share statistics (`devices`).

On one CPU these sums are most of the time of a large array, because XLA has fast code for the sums
of x and of x^2 alone. There the textbook's formulas come first, and stay where they are right:
where no mean is further from 0 than about four standard deviations, so that `E[x^2] - E[x]^2` loses
four of 24 bits at most, and no square overflows. A branch computes what is above for all else.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.devices import Devices
from flax_customgrad.layers.normalization.scaled_squares import (
    TINY,
    about_mean,
    chosen_factor,
    factors_of,
    variance_and_rstd,
)
from flax_customgrad.numerics.accumulation import in_turn
from flax_customgrad.numerics.platform import pays_to_branch
from flax_customgrad.numerics.sizes import is_known


class Moments(NamedTuple):
    """Statistics of an input, each one number for all elements that share it.

    `NormAxes.spread` makes them broadcast against the input.
    """

    shift: jax.Array
    """The rounded mean; 0 where the mean is not taken out."""
    correction: jax.Array
    """The mean of what the shift leaves."""
    variance: jax.Array
    """The mean square about the mean; inf where it overflows."""
    rstd: jax.Array
    """1 / sqrt(variance + epsilon); 0 where there is nothing to divide by."""
    n: jax.Array
    """How many elements there were, over all devices."""


def moments(
    x: jax.Array,
    mask: jax.Array | None,
    axes: NormAxes,
    devices: Devices,
    epsilon: float,
    centered: bool = True,
    dtype: Any = jnp.float32,
    apart: bool = False,
) -> Moments:
    """Computes the statistics of an input.

    Args:
        x: the input, of any shape, float.
        mask: True where an element counts, broadcastable to x; None where all do.
        axes: which elements share statistics.
        devices: which devices do.
        epsilon: added to the variance before the square root is taken.
        centered: whether the mean is taken out; without, the "variance" is the mean square.
        dtype: dtype of the statistics and of all sums, float32 or float64.
        apart: whether each sum over a large array in half precision widens it for itself.
    """
    if mask is None and devices.axis_name is None:
        size = axes.count(x.shape)
        if is_known(size) and size == 1 and centered:
            return _of_single_elements(x.astype(dtype), axes, epsilon)
        if pays_to_branch(x.size):
            return _of_plain_sums(x, axes, epsilon, centered, dtype, apart)
    return _exact(x.astype(dtype), mask, axes, devices, epsilon, centered)


def _of_single_elements(x: jax.Array, axes: NormAxes, epsilon: float) -> Moments:
    """Where each element has statistics of its own: it is its mean."""
    shift = axes.sum(x)
    nothing = shift - shift  # NaN for what is infinite
    rstd = epsilon**-0.5 if epsilon > 0 else 0.0
    return Moments(shift, nothing, nothing, nothing + rstd, jnp.ones((), x.dtype))


def _of_plain_sums(
    x: jax.Array, axes: NormAxes, epsilon: float, centered: bool, dtype: Any, apart: bool
) -> Moments:
    """The textbook's formulas, where they are right; the exact ones elsewhere.

    The textbook's are those of a shift of 0: what leads from the sums to the moments is the same,
    and a program holds it once. The sums are what the branch hands through, because of a mean XLA
    would make an array for it.
    """
    number, factors = np.dtype(dtype).type, factors_of(dtype, epsilon)
    count = jnp.asarray(axes.count(x.shape), dtype)
    of_squares = axes.sum(lax.square(x.astype(dtype)))
    nothing = lax.full_like(of_squares, 0)
    again = in_turn(x, of_squares) if apart else x
    of_numbers = axes.sum(again.astype(dtype)) if centered else nothing
    mean, mean_square = lax.div(of_numbers, count), lax.div(of_squares, count)
    variance = lax.max(lax.sub(mean_square, lax.square(mean)), number(0))
    is_right = [lax.lt(mean_square, number(jnp.finfo(dtype).max))]  # neither inf nor NaN
    if centered:
        most = lax.mul(lax.add(variance, number(epsilon)), number(_WELL_CONDITIONED))
        is_right.append(lax.le(mean_square, most))
    if epsilon < TINY:
        is_right.append(lax.gt(variance, number(TINY)))

    def textbook(x: jax.Array) -> tuple[jax.Array, ...]:
        return nothing, of_numbers, of_squares, *[nothing] * (len(factors) - 1)

    def exact(x: jax.Array) -> tuple[jax.Array, ...]:
        # Widened here again, because the argument of a branch is stored.
        return _exact_sums(x.astype(dtype), None, axes, count, factors, centered)

    shift, *sums = lax.cond(_all_hold(is_right), textbook, exact, x)
    correction, *squares = (_mean(total, count) for total in sums)
    factor, square = chosen_factor(squares, factors)
    about = about_mean(square, correction, factor)
    return Moments(shift, correction, *variance_and_rstd(about, factor, epsilon), count)


def _all_hold(conditions: Sequence[jax.Array]) -> jax.Array:
    """Whether all elements of several boolean arrays of one shape are True.

    In one reduction: where XLA on a CPU reduces one array, it first stores that array.
    """

    def both(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(map(lax.bitwise_and, left, right))

    of_none = (np.True_,) * len(conditions)
    axes = tuple(range(conditions[0].ndim))
    return functools.reduce(lax.bitwise_and, lax.reduce(tuple(conditions), of_none, both, axes))


def _exact(
    x: jax.Array,
    mask: jax.Array | None,
    axes: NormAxes,
    devices: Devices,
    epsilon: float,
    centered: bool,
) -> Moments:
    """The statistics by the formulas above."""
    size = axes.count(x.shape)
    count = jnp.asarray(size, x.dtype)
    if mask is not None:
        count = axes.sum(jnp.broadcast_to(mask, x.shape).astype(x.dtype))
    factors = factors_of(x.dtype, epsilon)
    shift, *sums = _exact_sums(x, mask, axes, count, factors, centered)
    correction, *squares = (_mean(total, count) for total in sums)
    squares = [about_mean(s, correction, f) for s, f in zip(squares, factors, strict=True)]
    if devices.axis_name is not None:
        count, shift, correction, squares = devices.combine(
            count, shift, correction, squares, factors
        )
    factor, about = chosen_factor(squares, factors)
    variance, rstd = variance_and_rstd(about, factor, epsilon)
    if mask is not None or size == 0:
        rstd = jnp.where(count > 0, rstd, 0)
    return Moments(shift, correction, variance, rstd, count)


def _exact_sums(
    x: jax.Array,
    mask: jax.Array | None,
    axes: NormAxes,
    count: jax.Array,
    factors: tuple[float, ...],
    centered: bool,
) -> tuple[jax.Array, ...]:
    """The shift, the sum of `x - shift`, and that of its square for each factor."""
    size = axes.count(x.shape)

    def total(a: jax.Array) -> jax.Array:
        return axes.sum(a if mask is None else jnp.where(mask, a, 0))

    if centered:
        shift = _mean(total(x), count)
        if mask is not None or not _is_power_of_two(size):
            # Where sum / size is rounded XLA may compute x - shift without that rounding, in one
            # pass and not in another. Of a shift with a bit less there is one version only.
            info = jnp.finfo(x.dtype)
            shift = lax.reduce_precision(shift, info.nexp, info.nmant - 1)
        d = lax.sub(x, axes.spread(shift, x.shape))
        of_rest = total(d)
    else:
        shift = of_rest = jnp.zeros_like(axes.sum(x))
        d = x
    of_squares = (total(lax.square(lax.mul(d, x.dtype.type(factor)))) for factor in factors)
    return shift, of_rest, *of_squares


def _mean(total: jax.Array, count: jax.Array) -> jax.Array:
    return lax.div(total, lax.max(count, count.dtype.type(1)))


_WELL_CONDITIONED = 16
"""The mean square, in variances, up to which the variance is taken as a difference."""


def _is_power_of_two(size: Any) -> bool:
    """Whether a division by it is exact; not known of a symbolic size."""
    return is_known(size) and not size & (size - 1)
