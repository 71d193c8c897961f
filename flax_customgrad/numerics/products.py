"""Products of a backward, laid out, summed and sharded like the array whose gradient they are."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.sharding import explicit_sharding


def parameter_gradient(lhs: jax.Array, rhs: jax.Array, numbers: Any, **where: Any) -> jax.Array:
    """A product summed over the batch: what the gradient of a kernel is.

    Args:
        lhs: array of any shape.
        rhs: array of any shape.
        numbers: which axes meet, as `lax.dot_general` takes them: ((lhs_contracting,
            rhs_contracting), (lhs_batch, rhs_batch)).
        **where: `like`, `order` and `precision` of `product`.

    Returns:
        An array laid out like the parameter, in the accumulator's dtype.
    """
    return product(lhs, rhs, numbers, accumulator(lhs, rhs), **where)


def input_gradient(lhs: jax.Array, rhs: jax.Array, numbers: Any, **where: Any) -> jax.Array:
    """A product summed over features: what the gradient of an input is.

    Args:
        lhs: array of any shape.
        rhs: array of any shape.
        numbers: which axes meet, as for `parameter_gradient`.
        **where: `like`, `order` and `precision` of `product`.

    Returns:
        An array laid out like the input. A half-precision input gets its gradient in that
        precision and costs no array of float32; a float32 input loses no digits.
    """
    return product(lhs, rhs, numbers, jnp.result_type(lhs, rhs, where["like"]), **where)


def product(
    lhs: jax.Array,
    rhs: jax.Array,
    numbers: Any,
    dtype: Any,
    *,
    like: jax.Array,
    order: Sequence[int] | None = None,
    precision: Any = None,
) -> jax.Array:
    """`lax.dot_general`, laid out and sharded like what it is a gradient of.

    Args:
        lhs: array of any shape.
        rhs: array of any shape.
        numbers: which axes meet.
        dtype: dtype of the result.
        like: the array whose gradient this is.
        order: which axis of `like` each axis of the product is; None where they agree. Axes of
            `like` may be missing.
        precision: `jax.lax.Precision`.

    Returns:
        An array with its axes in the order of `like`'s.
    """
    out = lax.dot_general(
        lhs,
        rhs,
        numbers,
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=explicit_sharding(jax.typeof(like), order),
    )
    if order is None:
        return out
    return lax.transpose(out, sorted(range(out.ndim), key=order.__getitem__))
