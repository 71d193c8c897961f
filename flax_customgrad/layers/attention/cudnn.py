"""Attention by the kernels of cuDNN, which `jax.nn.dot_product_attention` calls on GPUs of NVIDIA.

They compute in half precision, and have a backward of their own, which keeps what ours keeps: q, k,
v, the output and the logarithm of the sum of each row. Causality reaches them as such, and with it
a window to the left; every other bound is an array of which query sees which key.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_of_jax = jax.nn.dot_product_attention
"""The function of JAX, which a test replaces where there is no such GPU."""


def attention_by_cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: Any, mask: Any, is_causal: bool, left: Any
) -> jax.Array:
    """Each query's mean of the values, weighted by the softmax of its products with the keys.

    Args:
        q: array of shape (..., queries, heads, depth), bfloat16 or float16.
        k: array of shape (..., keys, key_heads, depth).
        v: array of shape (..., keys, key_heads, depth).
        bias: array that broadcasts to (..., heads, queries, keys), or None.
        mask: boolean array that broadcasts to that shape, or None.
        is_causal: whether query i sees keys up to i alone.
        left: from how many keys before its own place on a query sees them, where it is causal;
            None for all.

    Returns:
        Array of shape (..., queries, heads, depth), in the dtype of q.
    """
    batch = q.shape[:-3]
    return _of_jax(
        *(a.reshape(-1, *a.shape[-3:]) for a in (q, k, v)),
        bias=_in_one_batch(bias, batch),
        mask=_in_one_batch(mask, batch),
        is_causal=is_causal,
        local_window_size=None if left is None else (left, 0),
        implementation="cudnn",
    ).reshape(*batch, *q.shape[-3:-1], v.shape[-1])


def _in_one_batch(a: Any, batch: tuple[int, ...]) -> Any:
    """A bias or a mask of four axes, the first of which is that of all examples, or has size 1."""
    if a is None:
        return None
    a = lax.expand_dims(a, range(len(batch) + 3 - a.ndim))
    if any(size > 1 for size in a.shape[:-3]):
        a = jnp.broadcast_to(a, (*batch, *a.shape[-3:]))
    return a.reshape(-1, *a.shape[-3:])
