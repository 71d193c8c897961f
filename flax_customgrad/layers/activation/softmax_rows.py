"""Sums of exponentials over the rows of an array, defined for infinite inputs too.

    m = max x,  s = sum exp(x - m)

Where m is infinite, x - m is not a number, and the limit is taken instead. In a row that holds
infinity these elements share the whole weight equally. A row of minus infinity alone, and one that
`where` masks throughout, has no weight to share: softmax is 0 there, log_softmax and logsumexp
minus infinity, and every gradient 0. jax.nn answers both with NaN.

On one CPU a large array is computed as jax.nn does, which XLA hands to a library whole. A row in
which that is no number has none in its first place, and where there is such a row, all is computed
again by the formulas above. They give the derivative everywhere (`faster_on_one_cpu`).
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flax_customgrad.numerics.argument_checks import integers, is_integer

ReductionAxes = int | tuple[int, ...] | None
"""The axes of a row: one, several, or None for all."""


def reduction_axes(axis: int | Sequence[int] | None) -> ReductionAxes:
    """The axes of a row, hashable."""
    if axis is None or is_integer(axis):
        return axis if axis is None else operator.index(axis)  # type: ignore[arg-type]
    return integers(axis)


def only_where(x: Any, where: ArrayLike | None) -> jax.Array:
    """X where a mask is true, and minus infinity elsewhere; x without a mask."""
    return x if where is None else jnp.where(where, x, -jnp.inf)


def row_max(x: jax.Array, axis: ReductionAxes) -> jax.Array:
    """m, a constant to every derivative; the axes of a row have size 1.

    Args:
        x: array of any shape, float.
        axis: the axes of a row.
    """
    return lax.stop_gradient(jnp.max(x, axis, initial=-jnp.inf, keepdims=True))


def exponent(x: jax.Array, m: jax.Array) -> jax.Array:
    """`x - m` for an exponential, and where m is infinite the largest number in the place of both.

    There it is 0 for infinity, and for what is finite lower than any exponential needs. It uses x
    once, and neither compares nor selects: XLA on a CPU fuses it with the sums, and stores nothing.
    Of what is no number a fused minimum makes the largest: its exponential is infinite, and
    `nonzero` of the sum is no number again.

    Args:
        x: array of any shape, float32 or wider.
        m: the maxima of its rows.
    """
    limits = jnp.finfo(x.dtype)
    return jnp.minimum(x, limits.max) - jnp.clip(m, limits.min, limits.max)


def minus_max(x: jax.Array, m: jax.Array) -> jax.Array:
    """`x - m`, and where m is infinite its limit: 0 for infinity, minus infinity for all else.

    Args:
        x: array of any shape, float32 or wider.
        m: the maxima of its rows.
    """
    limits = jnp.finfo(x.dtype)
    finite = jnp.clip(m, limits.min, limits.max)
    rest = jnp.clip(m - finite, 0, limits.max)
    return jnp.minimum(exponent(x, m), x - finite - rest)


def nonzero(s: jax.Array) -> jax.Array:
    """A sum s of exponentials, of which the largest is 1; in a row without weight, not 0.

    Of an infinite one it is no number, and of what is none (a fused maximum would make one).
    """
    return s + jnp.maximum(0.5 - s, 0) + 0 * s
