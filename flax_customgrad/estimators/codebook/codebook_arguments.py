"""The arguments of quantizers: what is wrong with one, and what to write instead."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.numerics.dtypes import as_array


def size(layer: str, argument: str, value: Any) -> None:
    """Refuses a size that is no positive integer.

    Raises:
        ValueError: naming the layer and the argument.
    """
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{layer}: {argument}={value!r} must be an integer of at least 1")


def weight(layer: str, argument: str, value: float) -> None:
    """Refuses a number that is negative, infinite or NaN.

    Raises:
        ValueError: naming the layer and the argument.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{layer}: {argument}={value!r} must be a number of at least 0")


def word(layer: str, argument: str, value: Any, known: Sequence[str]) -> None:
    """Refuses a word that is not one of a few.

    Raises:
        ValueError: naming the layer, the argument and the words.
    """
    if value not in known:
        words = " or ".join(map(repr, known))
        raise ValueError(f"{layer}: {argument}={value!r} is unknown; write {words}")


def vectors(layer: str, z: Any, features: int) -> jax.Array:
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
