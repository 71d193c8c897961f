"""Sums in float32, or wider where an array is wider: how every backward adds up."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulator(*arrays: jax.Array) -> Any:
    """The dtype in which a backward sums: float32, or wider where an array is wider."""
    return jnp.result_type(jnp.float32, *arrays)


def total(g: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The sum over axes in the accumulator's dtype; what the gradient of a bias is.

    Args:
        g: array of any shape, float.
        axes: the axes to sum over, which are dropped.
    """
    return lax.reduce_sum(g.astype(accumulator(g)), axes)
