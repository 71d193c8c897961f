"""The state that a recurrent cell starts with: 0, or what an initializer draws."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def initial_carry(
    cell: str,
    shape: tuple[int, ...],
    dtype: Any,
    rngs: nnx.Rngs | nnx.RngStream | None,
    carry_init: nnx.Initializer | None,
) -> jax.Array:
    """One state of a cell before its first step.

    Args:
        cell: the name of the cell, for the error.
        shape: the shape of the state.
        dtype: its dtype.
        rngs: random numbers for `carry_init`, whose stream `carry` is taken; or a stream.
        carry_init: an initializer, or None for 0.

    Returns:
        Array of that shape and dtype.

    Raises:
        ValueError: `carry_init` is given and `rngs` is not.
    """
    if carry_init is None:
        return jnp.zeros(shape, dtype)
    stream = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
    if stream is None:
        raise ValueError(f"{cell}: carry_init draws from rngs; pass rngs=nnx.Rngs(0) too")
    return carry_init(stream(), shape, dtype)
