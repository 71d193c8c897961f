"""Broadcasting: which shapes fit, and the gradient of an array that was broadcast."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.numerics.accumulation import total


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether an array of one shape broadcasts to another."""
    lead = len(to) - len(shape)
    return lead >= 0 and all(n in (1, m) for n, m in zip(shape, to[lead:], strict=True))


def plus_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Adds a bias to an output, in the dtype to which they promote.

    Args:
        y: array of shape (..., features), float.
        bias: array of shape (features,), float; or None.
    """
    if bias is None:
        return y
    dtype = jnp.promote_types(y.dtype, bias.dtype)
    # An operator of jax.numpy takes JAX four times as long to trace.
    return lax.add(y.astype(dtype), lax.expand_dims(bias, range(y.ndim - 1)).astype(dtype))


def sum_to_shape(g: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The gradient of a broadcast array: summed over the axes along which it was repeated.

    Args:
        g: the gradient of the result, an array of the shape that was broadcast to, float.
        shape: the shape before broadcasting.

    Returns:
        Array of the shape before; float32 or wider where anything was summed.
    """
    lead = g.ndim - len(shape)
    repeated = [lead + i for i, n in enumerate(shape) if n == 1 != g.shape[lead + i]]
    axes = (*range(lead), *repeated)
    return lax.expand_dims(total(g, axes), [axis - lead for axis in repeated]) if axes else g
