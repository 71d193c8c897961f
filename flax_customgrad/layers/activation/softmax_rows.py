"""Sums of exponentials over the rows of an array, defined for infinite inputs too.

    m = max x,  s = sum exp(x - m)

Where m is infinite, x - m is not a number, and the limit is taken instead. In a row that holds
infinity these elements share the whole weight equally. A row of minus infinity alone, and one that
`where` masks throughout, has no weight to share: softmax is 0 there, log_softmax and logsumexp
minus infinity, and every gradient 0. jax.nn answers both with NaN.

On one CPU x - m of a large array is computed as jax.nn does, in one pass with the maximum, and
where it is not a number it is replaced afterwards (`of_infinite_rows`). A derivative of that would
not be a number either, so it has that of the formulas above (`faster_on_one_cpu`).
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flax_customgrad.numerics.argument_checks import integers, is_integer
from flax_customgrad.numerics.platform import pays_to_branch

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
        x: array of any shape, float32 or wider.
        axis: the axes of a row.
    """
    return lax.stop_gradient(jnp.max(x, axis, initial=-jnp.inf, keepdims=True))


def minus_max(x: jax.Array, m: jax.Array) -> jax.Array:
    """`x - m`, and its limit where m is infinite, without a second use of x, which XLA would store.

    Infinity cannot be subtracted from itself. The largest finite number can, twice: that leaves
    infinity, for which the minimum puts 0, and takes everything finite to minus infinity. The
    minimum is not with 0, where it would halve the second derivative of the largest element.
    Nothing here compares or selects, which XLA on a CPU would not fuse with the sums.

    Args:
        x: array of any shape, float32 or wider.
        m: the maxima of its rows.
    """
    limits = jnp.finfo(x.dtype)
    finite = jnp.clip(m, limits.min, limits.max)
    rest = jnp.clip(m - finite, 0, limits.max)
    return jnp.minimum(x - finite - rest, limits.tiny)


def nonzero(s: jax.Array) -> jax.Array:
    """A sum s of exponentials, of which the largest is 1; in a row without weight, not 0."""
    return jnp.maximum(s, 0.5)


def of_infinite_rows(x: jax.Array, axis: ReductionAxes) -> tuple[jax.Array, ...]:
    """The limits in rows with an infinite m; the axes of a row have size 1.

    Args:
        x: array of any shape, float32 or wider.
        axis: the axes of a row.

    Returns:
        Where m is infinite; s there; and exp(x - m) of the elements for which it is not a number:
        1 in a row that holds infinity, 0 in one of minus infinity alone.
    """
    m = row_max(x, axis)
    s = jnp.sum((x == jnp.inf).astype(x.dtype), axis, keepdims=True)
    return jnp.isinf(m), s, jnp.where(jnp.isinf(m), (m > 0).astype(x.dtype), m)


def faster_on_one_cpu(fast: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluates a function of large arrays by another on one CPU; its derivatives are its own.

    Args:
        fast: called like the function, with `axis` and an array; it returns the same.

    Returns:
        A decorator.
    """

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
        def evaluated(axis: ReductionAxes, x: jax.Array) -> Any:
            return fast(axis, x) if pays_to_branch(x.size) else function(axis, x)

        @evaluated.defjvp
        def _jvp(axis: ReductionAxes, primals: Any, tangents: Any) -> Any:
            return jax.jvp(functools.partial(function, axis), primals, tangents)

        return evaluated

    return decorator
