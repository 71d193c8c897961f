"""The scaled squares of a normalization: mean squares of any numbers, and what they say.

A square overflows from 1.8e19 on, and without an epsilon one may vanish as well. So squares are
taken of numbers multiplied by a factor, a power of two, which changes no digit: by 1, by a small
one, and where epsilon is next to nothing by a large one. For each statistic the one is chosen by
which nothing is lost:

    about    = mean((factor (x - shift))^2) - (factor correction)^2
    variance = about / factor^2
    rstd     = factor / sqrt(about + factor^2 epsilon)

There is no branch in it, which XLA on a CPU could not fuse.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TINY = 1e-30
"""The epsilon, and the variance, below which float32 squares lose digits."""


def factors_of(dtype: Any, epsilon: float) -> tuple[float, ...]:
    """What numbers of a dtype are multiplied by before they are squared, 1 first."""
    half = int(jnp.finfo(dtype).maxexp) // 2
    factors = (1.0, 2.0 ** -(half * 5 // 4))  # 2^-80 for float32
    return (*factors, 2.0**half) if epsilon < TINY else factors


def is_not_huge(squares: jax.Array) -> jax.Array:
    """Whether mean squares are far from overflowing; not of NaN."""
    return lax.lt(squares, squares.dtype.type(2.0 ** (int(jnp.finfo(squares.dtype).maxexp) - 8)))


def chosen_factor(
    squares: Sequence[jax.Array], factors: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """For each statistic the factor by which its squares lose nothing, and the square by that.

    Args:
        squares: mean squares, one for each factor.
        factors: those of `factors_of`.
    """
    plain = squares[0]
    is_normal, is_tiny = is_not_huge(plain), lax.le(plain, plain.dtype.type(TINY))

    def choose(candidates: Sequence[jax.Array]) -> jax.Array:
        of_plain, of_small, *of_large = candidates
        chosen = lax.select(is_normal, of_plain, of_small)
        for candidate in of_large:
            chosen = lax.select(is_tiny, candidate, chosen)
        return chosen

    return choose([lax.full_like(plain, factor) for factor in factors]), choose(squares)


def about_mean(square: jax.Array, correction: jax.Array, factor: jax.Array) -> jax.Array:
    """The mean square of `factor (x - shift)` as that about the mean."""
    about = lax.sub(square, lax.square(lax.mul(correction, factor)))
    return lax.max(about, about.dtype.type(0))


def variance_and_rstd(
    about: jax.Array, factor: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """What a mean square about the mean says, of numbers multiplied by a factor.

    Returns:
        The variance, inf where it overflows, and 1 / sqrt(variance + epsilon), 0 where there is
        nothing to divide by.
    """
    number = about.dtype.type
    # By the inverse: two divisions XLA makes one, by the square of the factor, which may be 0.
    inverse = lax.div(number(1), factor)
    variance = lax.mul(lax.mul(about, inverse), inverse)
    # In this order, because that square may be infinite.
    scaled = lax.add(about, lax.mul(lax.mul(factor, number(epsilon)), factor))
    rstd = lax.mul(lax.rsqrt(scaled), factor)
    if epsilon < TINY:
        rstd = jnp.where(scaled > 0, rstd, 0)
    return variance, rstd
