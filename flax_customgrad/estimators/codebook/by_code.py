"""Rows of a codebook by number, and sums over the vectors that have a number.

The one is the transpose of the other. On a mesh with Explicit axes JAX asks where their results
lie: `with_auto_axes` says that, and leaves it to the compiler how to get there.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.sharding import explicit_spec, with_auto_axes


def rows(codes: jax.Array, indices: jax.Array, like: jax.Array) -> jax.Array:
    """The codes that have certain numbers.

    Args:
        codes: array of shape (num_codes, features), float.
        indices: int32 array of any shape; a number that no code has gives NaN.
        like: array of shape (*indices.shape, features) whose sharding the result has.

    Returns:
        Array of shape (*indices.shape, features), in the dtype of codes.
    """

    def take(codes: jax.Array, indices: jax.Array) -> jax.Array:
        return jnp.take(codes, indices, axis=0, mode="fill", fill_value=jnp.nan)

    return with_auto_axes(take, explicit_spec(like), codes, indices)


def sums(values: jax.Array, indices: jax.Array, like: jax.Array) -> jax.Array:
    """The sum of the vectors of each code.

    Args:
        values: array of shape (*indices.shape, features), float.
        indices: int32 array of any shape; a vector of a number that no code has is left out.
        like: array of shape (num_codes, features) whose sharding the result has.

    Returns:
        Array of shape (num_codes, features), float32 or wider.
    """
    dtype = accumulator(values)

    def scatter(values: jax.Array, indices: jax.Array) -> jax.Array:
        return jnp.zeros(like.shape, dtype).at[indices].add(values.astype(dtype), mode="drop")

    return with_auto_axes(scatter, explicit_spec(like), values, indices)


def counts(indices: jax.Array, num_codes: int) -> jax.Array:
    """How many vectors each code has.

    Args:
        indices: int32 array of any shape; a number that no code has is left out.
        num_codes: how many codes there are.

    Returns:
        int32 array of shape (num_codes,).
    """

    def count(indices: jax.Array) -> jax.Array:
        return jnp.zeros(num_codes, jnp.int32).at[indices].add(1, mode="drop")

    return with_auto_axes(count, PartitionSpec(None), indices)
