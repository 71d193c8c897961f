"""`moments`: mean and variance that stay right where the textbook's formulas do not.

    shift      = mean(x)                                 with a bit less than mean(x) has
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
of x and of x^2 alone. Those are the sums above for a shift of 0, and there they come first. They
stay where they are right: where no mean is further from 0 than about four standard deviations, so
that `E[x^2] - E[x]^2` loses four of 24 bits at most, and no square overflows. A branch computes the
sums about the mean for all else.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.devices import Devices
from flax_customgrad.layers.normalization.mean import Mean, rounded
from flax_customgrad.layers.normalization.scaled_squares import (
    TINY,
    about_mean,
    chosen_factor,
    factors_of,
    is_not_huge,
    variance_and_rstd,
)
from flax_customgrad.numerics.accumulation import in_turn
from flax_customgrad.numerics.everywhere import everywhere
from flax_customgrad.numerics.operand import operand
from flax_customgrad.numerics.platform import pays_to_branch
from flax_customgrad.numerics.sizes import is_known


class Standard(NamedTuple):
    """What an input is standardized by, each one number for all elements that share it.

    `NormAxes.spread` makes arrays of the input's shape of them.
    """

    rstd: jax.Array
    """1 / sqrt(variance + epsilon); 0 where there is nothing to divide by."""
    mean: Mean | None
    """The mean; None where it is not taken out."""


class Moments(NamedTuple):
    """The statistics of an input."""

    standard: Standard
    """What it is standardized by."""
    variance: jax.Array
    """The mean square about the mean, of the same shape; inf where it overflows."""
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
    size, is_whole = axes.count(x.shape), mask is None and devices.axis_name is None
    if is_whole and centered and is_known(size) and size == 1:
        return _of_single_elements(x.astype(dtype), axes, epsilon)
    n = size if mask is None else axes.sum(jnp.broadcast_to(mask, x.shape).astype(dtype))
    count, share = jnp.asarray(n, dtype), share_of(n, dtype)
    factors = factors_of(dtype, epsilon)
    sums = _Sums(mask, axes, np.dtype(dtype), factors, centered, apart)

    may_branch = is_whole and pays_to_branch(x.size)
    shift, totals = _exact_sums(x, sums, share, epsilon, may_branch)
    totals, mean = [lax.mul(total, share) for total in totals], None
    if shift is not None:
        mean = Mean(shift, totals.pop(0))
    factor, about = chosen_factor(totals, factors)
    if mean is not None:
        about = about_mean(about, mean.correction, factor)
    if devices.axis_name is not None:
        count, mean, about, factor = devices.combine(count, mean, about, factor)
    variance, rstd = variance_and_rstd(about, factor, epsilon)
    if mask is not None or size == 0:
        rstd = jnp.where(count > 0, rstd, 0)
    return Moments(Standard(rstd, mean), variance, count)


def _exact_sums(
    x: jax.Array, sums: "_Sums", share: jax.Array, epsilon: float, may_branch: bool
) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
    """A shift, None without a mean, and the sums about it (`_Sums.about`)."""
    if not may_branch:
        shift = rounded(lax.mul(sums.of_numbers(x), share)) if sums.centered else None
        return shift, sums.about(x, shift)
    of_squares, textbook, mean, shift = sums.of_squares(x, 1), [], None, None
    if sums.centered:
        textbook = [sums.of_numbers(in_turn(x, of_squares) if sums.apart else x)]
        mean = lax.mul(textbook[0], share)
    is_right = _is_right(lax.mul(of_squares, share), epsilon, mean)
    if mean is not None:
        shift = lax.select(is_right, lax.full_like(mean, 0), rounded(mean))
        # Barrier: XLA would choose it anew for each element of x.
        shift = lax.optimization_barrier(shift)
    # The squares by the first factor are those that will be chosen.
    textbook = (*textbook, *[of_squares] * len(sums.factors))
    exact = replace(sums, apart=True)
    return shift, lax.cond(is_right, lambda _: textbook, lambda x: exact.about(x, shift), x)


def _of_single_elements(x: jax.Array, axes: NormAxes, epsilon: float) -> Moments:
    """Where each element has statistics of its own: it is its mean."""
    shift = axes.sum(x)
    nothing = shift - shift  # NaN for what is infinite
    rstd = epsilon**-0.5 if epsilon > 0 else 0.0
    standard = Standard(nothing + rstd, Mean(shift, nothing))
    return Moments(standard, nothing, jnp.ones((), x.dtype))


@dataclass(frozen=True)
class _Sums:
    """The sums of an input, and those of its squares.

    Attributes:
        mask: where they are taken; None for everywhere.
        axes: which elements share statistics.
        dtype: the dtype of the sums.
        factors: what numbers are multiplied by before they are squared.
        centered: whether the mean is taken out.
        apart: whether each sum over a large array reads it for itself.
    """

    mask: jax.Array | None
    axes: NormAxes
    dtype: Any
    factors: tuple[float, ...]
    centered: bool
    apart: bool

    def of_numbers(self, x: jax.Array, shift: jax.Array | None = None) -> jax.Array:
        """The sum of x - shift."""
        return self._sum(self._moved(x, shift))

    def of_squares(self, x: jax.Array, factor: float, shift: jax.Array | None = None) -> jax.Array:
        """The sum of (factor (x - shift))^2."""
        d = self._moved(x, shift)
        return self._sum(lax.square(d if factor == 1 else lax.mul(d, d.dtype.type(factor))))

    def about(self, x: jax.Array, shift: jax.Array | None) -> tuple[jax.Array, ...]:
        """The sum of x - shift, where a mean is taken out, and its squares' for each factor."""
        shift = self.axes.of_features(shift, x.shape)
        found = [self.of_numbers(x, shift)] if self.centered else []
        for factor in self.factors:
            x, shift = in_turn((x, shift), found) if self.apart else (x, shift)
            found.append(self.of_squares(x, factor, shift))
        return tuple(found)

    def _moved(self, x: jax.Array, shift: jax.Array | None) -> jax.Array:
        x = x.astype(self.dtype)
        return x if shift is None else lax.sub(x, self.axes.spread(shift, x.shape))

    def _sum(self, a: jax.Array) -> jax.Array:
        return self.axes.sum(a if self.mask is None else jnp.where(self.mask, a, 0))


def _is_right(mean_square: jax.Array, epsilon: float, mean: jax.Array | None) -> jax.Array:
    """Whether the textbook's formulas are right for all statistics; without a mean, of squares."""
    number = mean_square.dtype.type
    conditions = [is_not_huge(mean_square)]
    if mean is not None:
        most = lax.add(lax.mul(mean_square, number(_MOST_OF_MEAN)), number(epsilon))
        conditions.append(lax.lt(lax.square(mean), most))
    if epsilon < TINY:
        # The variance is more than a 16th of it, and not tiny.
        conditions.append(lax.gt(mean_square, number(32 * TINY)))
    return everywhere(*conditions)


_MOST_OF_MEAN = 15 / 16
"""The share of the mean square that may be that of the mean: the variance is the difference."""


def share_of(count: Any, dtype: Any) -> jax.Array:
    """1 / count, by which a sum becomes a mean; 1 where there is nothing.

    Args:
        count: how many elements are summed: an int, a symbolic size or an array.
        dtype: that of the sum.
    """
    if isinstance(count, int):
        return operand(1 / max(count, 1), dtype)
    count = jnp.asarray(count, dtype)
    return lax.div(count.dtype.type(1), lax.max(count, count.dtype.type(1)))
