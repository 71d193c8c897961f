"""`moments`: mean and variance that stay right where the textbook's formulas do not.

    shift      = mean(x)
    correction = mean(x - shift)                         what rounding left out of the shift
    variance   = mean((x - shift)^2) - correction^2
    rstd       = 1 / sqrt(variance + epsilon)
    x_hat      = ((x - shift) - correction) rstd

With a mean of 1e4 and a standard deviation of 1, `E[x^2] - E[x]^2` in float32 has no correct digit
(an error of 230 to 770 in the output, 1e7 in `dx`), `E[(x - shift)^2]` has three; this has all
seven. The correction stays apart from the shift because float32 cannot hold their sum.

A square overflows from 1.8e19 on. So the variance is taken a second time of numbers made smaller,
`shrunk = mean((small (x - shift))^2)`, and above a floor `rstd` is `small / sqrt(shrunk)`. There
is no branch in it, which XLA on a CPU could not fuse. Only where the sum itself overflows (3.4e38
in float32) is the result NaN. Without an epsilon a square may vanish as well, and it is taken a
third time of numbers made larger, `grown`.

On one CPU these sums are most of the time of a large array, because XLA has fast code for the sums
of x and of x^2 alone. There the textbook's formulas come first, and stay where they are right:
where no mean is further from 0 than about four standard deviations, so that `E[x^2] - E[x]^2` loses
four of 24 bits at most, and no square overflows. A branch computes what is above for all else.

Devices that share statistics exchange their own (count, shift, correction, squares), in one
collective, and combine them exactly; a device without any element weighs nothing. That is where
they are named, by `axis_name`. Where a mesh splits the batch of a BatchNorm under `jax.jit`, the
program is that of one device, and the mean has to be known before it can be subtracted. This is a
collective of its own, of one number for each feature: with the backward's there are three, where
nnx has two with the textbook's formulas, its default, and four with `use_fast_variance=False`. The
textbook's sums would lose the same digits here, and no shift that all devices know without a
collective, such as the running mean, is near the mean when training starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_customgrad.layers.normalization.axes import NormAxes
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


@dataclass(frozen=True)
class Devices:
    """The devices that share statistics, along a named axis of shard_map, pmap or vmap.

    Attributes:
        axis_name: the axis, or several; None for each device on its own.
        groups: divides the axis into groups that share, as `jax.lax.psum` takes them; or None.
    """

    axis_name: Any = None
    groups: tuple[tuple[int, ...], ...] | None = None

    def sum(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Sums arrays of one shape over the devices, in one collective."""
        if self.axis_name is None:
            return arrays
        stacked = lax.psum(jnp.stack(arrays), self.axis_name, axis_index_groups=self.groups)
        return tuple(stacked)

    def gather(self, a: jax.Array) -> jax.Array:
        """Stacks what each device holds along a new first axis; the same on all of them."""
        # A psum of slots rather than an all_gather, whose result shard_map takes to differ.
        index = lax.axis_index(self.axis_name)
        slots = lax.psum(1, self.axis_name, axis_index_groups=self.groups)
        if self.groups is not None:
            place = {device: i for group in self.groups for i, device in enumerate(group)}
            index = jnp.array([place[device] for device in sorted(place)])[index]
        mine = jnp.arange(slots) == index
        return self.sum(jnp.where(mine.reshape(-1, *[1] * a.ndim), a, 0))[0]


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


def widened_again(x: jax.Array, dtype: Any, apart: bool) -> jax.Array:
    """Widens an array for another use.

    Args:
        x: array of any shape, float.
        dtype: what it is widened to.
        apart: whether the uses stay apart. Of what is widened for several XLA on a CPU stores a
            wide copy for all of them.
    """
    return (lax.optimization_barrier(x) if apart else x).astype(dtype)


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
    number, factors = np.dtype(dtype).type, _factors(dtype, epsilon)
    count = jnp.asarray(axes.count(x.shape), dtype)
    of_squares = axes.sum(lax.square(x.astype(dtype)))
    nothing = lax.full_like(of_squares, 0)
    of_numbers = axes.sum(widened_again(x, dtype, apart)) if centered else nothing
    mean, mean_square = lax.div(of_numbers, count), lax.div(of_squares, count)
    variance = lax.max(lax.sub(mean_square, lax.square(mean)), number(0))
    is_right = lax.lt(mean_square, number(jnp.finfo(dtype).max))  # neither inf nor NaN
    if centered:
        most = lax.mul(lax.add(variance, number(epsilon)), number(_WELL_CONDITIONED))
        is_right = lax.bitwise_and(is_right, lax.le(mean_square, most))
    if epsilon < _TINY:
        is_right = lax.bitwise_and(is_right, lax.gt(variance, number(_TINY)))

    def textbook(x: jax.Array) -> tuple[jax.Array, ...]:
        return nothing, of_numbers, of_squares, *[nothing] * (len(factors) - 1)

    def exact(x: jax.Array) -> tuple[jax.Array, ...]:
        # Widened here again, because the argument of a branch is stored.
        return _exact_sums(x.astype(dtype), None, axes, count, factors, centered)

    is_all_right = lax.reduce_and(is_right, range(is_right.ndim))
    shift, *sums = lax.cond(is_all_right, textbook, exact, x)
    correction, squares = _about_mean(sums, count, factors)
    return Moments(shift, correction, *_variance_and_rstd(squares, epsilon), count)


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
    factors = _factors(x.dtype, epsilon)
    shift, *sums = _exact_sums(x, mask, axes, count, factors, centered)
    correction, squares = _about_mean(sums, count, factors)
    if devices.axis_name is not None:
        count, shift, correction, squares = _combined(
            devices, count, shift, correction, squares, factors
        )
    variance, rstd = _variance_and_rstd(squares, epsilon)
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


def _about_mean(
    sums: Sequence[jax.Array], count: jax.Array, factors: tuple[float, ...]
) -> tuple[jax.Array, list[jax.Array]]:
    """The mean of `x - shift`, and its mean squares about that, one for each factor."""
    correction, *squares = (_mean(total, count) for total in sums)
    # Where its square would overflow, so does the mean square, and inf - inf is no number.
    number = correction.dtype.type
    root = number(_windows(correction.dtype)[2])
    return correction, [
        lax.sub(square, lax.square(lax.min(lax.abs(lax.mul(correction, number(factor))), root)))
        for square, factor in zip(squares, factors, strict=True)
    ]


def _variance_and_rstd(squares: list[jax.Array], epsilon: float) -> tuple[jax.Array, jax.Array]:
    """What the mean squares about the mean say, one for each of `_factors`."""
    number = squares[0].dtype.type
    variance, shrunk, *grown = (lax.max(square, number(0)) for square in squares)
    small, floor, _, large = _windows(variance.dtype)
    is_large = lax.gt(shrunk, number(floor))
    of_large, of_others = number(epsilon * small**2), number(epsilon)
    rstd = lax.rsqrt(lax.select(is_large, lax.add(shrunk, of_large), lax.add(variance, of_others)))
    rstd = lax.select(is_large, lax.mul(rstd, number(small)), rstd)
    if grown:
        exact = grown[0] + epsilon * large * large  # in float64 the square alone is infinite
        of_tiny = jnp.where(exact > 0, large * lax.rsqrt(exact), 0)
        rstd = jnp.where(variance > _TINY, rstd, of_tiny)
    return variance, rstd


def _factors(dtype: Any, epsilon: float) -> tuple[float, ...]:
    """What numbers are multiplied by before they are squared."""
    small, _, _, large = _windows(dtype)
    return (1.0, small, large) if epsilon < _TINY else (1.0, small)


_WELL_CONDITIONED = 16
"""The mean square, in variances, up to which the variance is taken as a difference."""

_TINY = 1e-30
"""The epsilon, and the variance, below which float32 squares lose digits."""


def _is_power_of_two(size: Any) -> bool:
    """Whether a division by it is exact; not known of a symbolic size."""
    return is_known(size) and not size & (size - 1)


def _windows(dtype: Any) -> tuple[float, float, float, float]:
    """Powers of two, which change no digit, for what squares would lose.

    Returns:
        A factor for what is too large to be squared, the least mean square that it is used for,
        2^9 below that of a variance which overflows, the largest number that can be squared, and a
        factor for what is too small: 2^-80, 2^-41, 2^60 and 2^64 for float32.
    """
    half = int(jnp.finfo(dtype).maxexp) // 2
    return 2.0 ** -(half * 5 // 4), 2.0 ** -(half // 2 + 9), 2.0 ** (half - 4), 2.0**half


def _combined(
    devices: Devices,
    count: jax.Array,
    shift: jax.Array,
    correction: jax.Array,
    squares: list[jax.Array],
    factors: tuple[float, ...],
) -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]:
    """Combines the statistics of each device into those of all of them.

    The variance is the weighted mean of each device's own and the square of its distance from the
    mean of all.
    """
    own = jnp.stack([jnp.broadcast_to(count, shift.shape), shift, correction, *squares])
    n, m, c, *squares = devices.gather(own).swapaxes(0, 1)
    weight = n / jnp.maximum(n.sum(0), 1)
    shift = (weight * m).sum(0)
    distance = (m - shift) + c
    correction = (weight * distance).sum(0)
    about = [
        (weight * (square + ((distance - correction) * factor) ** 2)).sum(0)
        for square, factor in zip(squares, factors, strict=True)
    ]
    return n.sum(0), shift, correction, about
