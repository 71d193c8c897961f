"""`everywhere`: whether conditions hold for all elements, by one pass that stores nothing."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax


def everywhere(*conditions: jax.Array) -> jax.Array:
    """Whether all elements of several boolean arrays are True.

    One reduction of them all. A single array is given to it twice: XLA on a CPU would store the
    array and reduce it in two steps, each of which it compiles.

    Args:
        *conditions: arrays of one shape, bool.

    Returns:
        A bool.
    """

    def both(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(map(lax.bitwise_and, left, right))

    conditions = conditions * 2 if len(conditions) == 1 else conditions
    of_none, axes = (np.True_,) * len(conditions), tuple(range(conditions[0].ndim))
    return functools.reduce(lax.bitwise_and, lax.reduce(conditions, of_none, both, axes))
