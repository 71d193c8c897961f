"""The checks of the vectors, and of their mask, that a vector quantizer is called with."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.numerics.dtypes import as_array


def check_vectors(layer: str, z: Any, features: int) -> jax.Array:
    """Checks that vectors are floats with the right number of features.

    Args:
        layer: the name of the layer, for the error.
        z: array of shape (..., features), float.
        features: how many features the vectors should have.

    Returns:
        z as an array of JAX.

    Raises:
        TypeError: z is not an array of real floating numbers.
        ValueError: z has another number of features.
    """
    z = as_array(z)
    if not isinstance(z, jax.Array) or not jnp.issubdtype(z.dtype, jnp.floating):
        found = z.dtype if isinstance(z, jax.Array) else type(z).__name__
        raise TypeError(f"{layer}: z is {found}; write a floating array, z.astype(jnp.float32)")
    if z.ndim == 0 or z.shape[-1] != features:
        raise ValueError(f"{layer}: z has shape {z.shape}; its last axis must have {features}")
    return z


def check_mask(layer: str, mask: Any, z: jax.Array) -> jax.Array | None:
    """Checks a mask of vectors.

    Args:
        layer: the name of the layer, for the error.
        mask: bool array of shape (...), which vectors count; or None for all.
        z: array of shape (..., features), float.

    Returns:
        The mask as an array of JAX, or None.

    Raises:
        TypeError: the mask is not an array of bool.
        ValueError: it has not one element for each vector.
    """
    if mask is None:
        return None
    mask = as_array(mask)
    if not isinstance(mask, jax.Array) or mask.dtype != jnp.bool:
        found = mask.dtype if isinstance(mask, jax.Array) else type(mask).__name__
        raise TypeError(f"{layer}: mask is {found}; write an array of bool, such as mask > 0")
    if mask.shape != z.shape[:-1]:
        raise ValueError(
            f"{layer}: mask has shape {mask.shape} and z {z.shape}; a mask has one element for "
            f"each vector, {z.shape[:-1]}"
        )
    return mask
