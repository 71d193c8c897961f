"""The argument of vector quantizers: what is wrong with it, and what to write instead."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.numerics.dtypes import as_array


def check_vectors(layer: str, z: Any, features: int) -> jax.Array:
    """The vectors as an array of JAX, if they are floats with as many features as they should have.

    Raises:
        TypeError: z is no array, or one of something else than real floating numbers.
        ValueError: it has another number of features.
    """
    z = as_array(z)
    if not isinstance(z, jax.Array) or not jnp.issubdtype(z.dtype, jnp.floating):
        found = z.dtype if isinstance(z, jax.Array) else type(z).__name__
        raise TypeError(f"{layer}: z is {found}; write a floating array, z.astype(jnp.float32)")
    if z.ndim == 0 or z.shape[-1] != features:
        raise ValueError(f"{layer}: z has shape {z.shape}; its last axis must have {features}")
    return z
