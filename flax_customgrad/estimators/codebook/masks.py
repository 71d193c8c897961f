"""Vectors that a mask leaves out, such as padding, and numbers that no code has."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.contract.promotion import promoting
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.sizes import at_least_one


def where_mask(mask: jax.Array | None, vectors: jax.Array) -> jax.Array:
    """Vectors where a mask is true, and 0 elsewhere.

    Args:
        mask: bool array of shape (...); or None for all.
        vectors: array of shape (..., features), float.
    """
    return vectors if mask is None else jnp.where(mask[..., None], vectors, 0)


def where_vector(
    mask: jax.Array | None, vectors: jax.Array, indices: jax.Array, num_codes: int
) -> jax.Array:
    """Numbers of codes, and `num_codes` for a vector that has none: with NaN in it, or left out.

    Args:
        mask: bool array of shape (...); or None for all.
        vectors: array of shape (..., features), float.
        indices: int32 array of shape (...).
        num_codes: how many codes there are.
    """
    has_none = jnp.any(jnp.isnan(vectors), -1)
    has_none = has_none if mask is None else has_none | ~mask
    return jnp.where(has_none, num_codes, indices)


@promoting
def where_code(indices: jax.Array, num_codes: int, codes: jax.Array) -> jax.Array:
    """Codes where there is one of a certain number, and NaN elsewhere.

    Args:
        indices: integers of shape (...).
        num_codes: how many codes there are.
        codes: array of shape (..., features), float.
    """
    return jnp.where(((indices >= 0) & (indices < num_codes))[..., None], codes, jnp.nan)


def count_vectors(z: jax.Array, mask: jax.Array | None) -> Any:
    """How many vectors there are, at least 1.

    Args:
        z: array of shape (..., features), float.
        mask: bool array of shape (...), which of them count; or None for all.
    """
    if mask is None:
        return at_least_one(z.size // z.shape[-1])
    return jnp.maximum(1, jnp.sum(mask, dtype=accumulator(z)))
