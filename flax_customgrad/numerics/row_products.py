"""`sum_over_rows`: the sum over rows in the gradient of every kernel, as XLA on a CPU is fast.

    out[i, o] = sum_r lhs[r, i] rhs[r, o]

XLA has a library for products that sum over the columns of their first factor. For this one it
turns the first factor, number by number: 18 ms for 4704 x 1024 numbers, where the product takes 7.
So a narrower second factor is turned instead, and the result. A sum over a single axis goes to
another library, that turns nothing and is slower in bfloat16; over two axes it does not.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.numerics.platform import is_one_cpu
from flax_customgrad.numerics.sizes import is_known


def sum_over_rows(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_rows: Sequence[int],
    rhs_rows: Sequence[int],
    dtype: Any,
    precision: Any = None,
) -> jax.Array:
    """Sums products over the rows of two arrays.

    Args:
        lhs: array of any shape.
        rhs: array of any shape.
        lhs_rows: the axes of `lhs` that count rows.
        rhs_rows: those of `rhs`, in the same order.
        dtype: dtype of the result.
        precision: `jax.lax.Precision`, or one for each array.

    Returns:
        Array of the other axes of `lhs`, then those of `rhs`.
    """
    rows = tuple(lhs_rows), tuple(rhs_rows)
    is_turned = is_one_cpu() and _costs_less_turned(lhs, rhs, *rows)
    is_bfloat16 = is_one_cpu() and lhs.dtype == rhs.dtype == jnp.bfloat16
    if len(rows[0]) == 1 and (is_turned or is_bfloat16):
        lhs, rhs = lax.expand_dims(lhs, [0]), lax.expand_dims(rhs, [0])
        rows = (0, lhs_rows[0] + 1), (0, rhs_rows[0] + 1)

    def product(a: jax.Array, b: jax.Array, rows: Any, precision: Any) -> jax.Array:
        numbers = (rows, ((), ()))
        return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=dtype)

    if not is_turned:
        return product(lhs, rhs, rows, precision)
    precision = precision[::-1] if isinstance(precision, tuple) else precision
    # Barrier: XLA would turn the first factor after all, so as not to turn the result.
    turned = lax.optimization_barrier(product(rhs, lhs, rows[::-1], precision))
    first = rhs.ndim - len(rows[1])
    return lax.transpose(turned, (*range(first, turned.ndim), *range(first)))


def _costs_less_turned(
    lhs: jax.Array, rhs: jax.Array, lhs_rows: Sequence[int], rhs_rows: Sequence[int]
) -> bool:
    """Whether the second factor and the result are smaller than the first factor."""
    if not is_known(lhs.size) or not is_known(rhs.size):
        return False
    features = math.prod(n for i, n in enumerate(lhs.shape) if i not in lhs_rows)
    others = math.prod(n for i, n in enumerate(rhs.shape) if i not in rhs_rows)
    return lhs.size > rhs.size + features * others
