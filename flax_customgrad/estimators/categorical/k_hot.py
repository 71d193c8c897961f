"""k-hot: 1 for the k largest along an axis, 0 elsewhere; at a tie the lower index comes first.

The ones are placed by index. A comparison with the value of the maximum would not do: XLA may
compute an element twice, in two fusions, and round it differently.
"""

import jax
import jax.numpy as jnp
from jax import lax


def k_hot(z: jax.Array, k: int, axis: int) -> jax.Array:
    """1 for the k largest along an axis, 0 elsewhere; a row without k finite largest is NaN.

    Args:
        z: array of any shape, float.
        k: how many are 1.
        axis: the axis along which they are the largest.

    Returns:
        Array like z.
    """
    z = lax.stop_gradient(z)
    first = jnp.max(z, axis, keepdims=True)
    if k == 1:
        last, indices = first, index_of_largest(z, axis)
    else:
        # To top_k, -0 is less than 0.
        values, indices = lax.top_k(jnp.where(z == 0, 0, z), k, axis=axis)
        last = lax.slice_in_dim(values, k - 1, k, axis=axis)
    hot = mask_at(indices, z.shape, axis).astype(z.dtype)
    return jnp.where(jnp.isfinite(first) & jnp.isfinite(last), hot, jnp.nan)


def index_of_largest(z: jax.Array, axis: int) -> jax.Array:
    """The index of the largest along an axis, which keeps size 1; the first at a tie."""
    return jnp.argmax(lax.stop_gradient(z), axis, keepdims=True)


def mask_at(indices: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """True at some indices along an axis.

    Args:
        indices: integer array of that shape, but of size k along the axis.
        shape: the shape of the result.
        axis: the axis.

    Returns:
        Array of bool of that shape.
    """
    axis %= len(shape)
    index = lax.broadcasted_iota(indices.dtype, shape, axis)
    return jnp.any(jnp.expand_dims(indices, axis + 1) == jnp.expand_dims(index, axis), axis)
