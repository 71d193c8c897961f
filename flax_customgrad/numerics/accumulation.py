"""Float32 accumulation: the dtype in which every backward sums, and sums in it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulator(*arrays: Any) -> Any:
    """The dtype in which a backward sums: float32, or wider where an array or dtype is wider.

    Args:
        *arrays: arrays and dtypes. A weakly typed array counts by its dtype, as its gradient does.
    """
    with jax.numpy_dtype_promotion("standard"):  # the user may have JAX refuse to promote
        return jnp.result_type(jnp.float32, *(getattr(a, "dtype", a) for a in arrays))


def total(g: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Sums over axes in the accumulator's dtype, such as for the gradient of a bias.

    Args:
        g: array of any shape, float.
        axes: the axes to sum over, which are dropped.

    Returns:
        Array without those axes, float32 or wider.
    """
    return lax.reduce_sum(g.astype(accumulator(g)), axes)


def fusion_barrier(x: jax.Array) -> jax.Array:
    """Barrier: stops XLA on a CPU from fusing what leads to an array with the sums behind it.

    XLA hands a sum to a library, together with the products, additions and maxima that lead to it
    or follow it, and stores each of their terms. A rounding stops that, and one to the array's own
    precision changes no value. Without it, summing 2x2 averages stores 3 arrays and takes 1.7 times
    as long.

    Args:
        x: array of any shape, float.

    Returns:
        The same array.
    """
    limits = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, limits.nexp, limits.nmant)


def in_turn(arrays: Any, done: Any) -> Any:
    """Large arrays, for a pass over them that begins when another is done.

    XLA on a CPU computes each sum in a loop of its own, and stores what several of them need, such
    as an input in float32. Of passes that wait for each other it knows no such thing, and each
    computes it for itself. It is not for a GPU, which takes several sums in one pass, nor for
    several devices, which would exchange what several passes need more than once.

    Args:
        arrays: a tree of arrays that the pass reads.
        done: a tree of small arrays, the result of the pass before.

    Returns:
        The same arrays.
    """
    return lax.optimization_barrier((arrays, done))[0]
