"""Blocks of a kernel: the weights of one output that share a scale, along the inputs.

Blocks begin with the first input of every output, and the last one of an output is shorter where
the block's size does not divide the number of inputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Compiled as one also outside of a jit, where each step would be an array of the kernel's size.
compiled = functools.partial(jax.jit, static_argnums=0, inline=True)


def split_kernel(w: jax.Array, block: int) -> jax.Array:
    """The blocks of a kernel, the last ones filled up with zeros.

    Args:
        w: array of shape (n, m).
        block: how many weights make a block.

    Returns:
        Array of shape (ceil(n / block), block, m).
    """
    n, m = w.shape
    if n % block:
        w = jnp.pad(w, ((0, -n % block), (0, 0)))
    return w.reshape(-(-n // block), block, m)


def repeat_per_weight(scales: jax.Array, block: int, n: int) -> jax.Array:
    """What belongs to a block, for each of its weights.

    Args:
        scales: array of shape (ceil(n / block), m).
        block: how many weights make a block.
        n: how many weights an output has.

    Returns:
        Array of shape (n, m).
    """
    blocks, m = scales.shape
    each = jnp.broadcast_to(scales[:, None], (blocks, block, m)).reshape(blocks * block, m)
    return each if n == blocks * block else lax.slice_in_dim(each, 0, n)


def quotient_or_zero(w: jax.Array, scale: jax.Array) -> jax.Array:
    """`w / scale`, and 0 where the scale is 0: every weight of such a block is stored as zero.

    Args:
        w: array of any shape.
        scale: array of that shape.
    """
    return jnp.where(scale == 0, 0, w / jnp.where(scale == 0, 1, scale))
