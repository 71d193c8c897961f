"""Sums in float32, or wider where an array is wider: how every backward adds up."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulator(*arrays: Any) -> Any:
    """The dtype in which a backward sums: float32, or wider where an array or dtype is wider."""
    return jnp.result_type(jnp.float32, *arrays)


def total(g: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The sum over axes in the accumulator's dtype; what the gradient of a bias is.

    Args:
        g: array of any shape, float.
        axes: the axes to sum over, which are dropped.
    """
    return lax.reduce_sum(g.astype(accumulator(g)), axes)


def fusion_barrier(x: jax.Array) -> jax.Array:
    """An array as it is, which XLA on a CPU does not take apart for the next sum over it.

    Such a sum it hands to a library, together with the products, additions and maxima that lead to
    it, and stores each of their terms. Rounding is not taken along, and to the array's own
    precision it changes nothing. 2x2 averages that are summed up take 3 arrays without it, and 1.7
    times as long.

    Args:
        x: array of any shape, float.
    """
    limits = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, limits.nexp, limits.nmant)
