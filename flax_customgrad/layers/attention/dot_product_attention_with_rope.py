"""dot_product_attention_with_rope: attention whose queries and keys are rotated by their places.

    forward   q' = R_t q,  k' = R_s k        R turns pairs of features, by the place t or s
              o  = attention(q', k', v)
    backward  dq', dk', dv as in `attention`
              dq = R_t^T dq',  dk = R_s^T dk'
    kept      what `attention` keeps; the cosines and sines of R

It is composed: the rotation is linear in queries and keys, and JAX transposes it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from flax_customgrad.layers.attention.dot_product_attention import dot_product_attention
from flax_customgrad.numerics.broadcasting import broadcasts

rope_of_nnx: Callable[..., jax.Array] | None = getattr(nnx, "dot_product_attention_with_rope", None)
"""The function of flax.nnx, which flax 0.12.8 does not have."""


def dot_product_attention_with_rope(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    rope: Callable[..., jax.Array],
    input_positions: ArrayLike | None = None,
    **kwargs: Any,
) -> jax.Array:
    """`dot_product_attention` of queries and keys with rotary position embeddings.

    The function of flax.nnx, with the attention of this library. Give it to a
    `MultiHeadAttention` as `attention_fn=functools.partial(..., rope=rope)`; one that holds the
    function of flax.nnx calls this one.

    Args:
        query: array of shape (..., queries, heads, depth), float.
        key: array of shape (..., keys, key_heads, depth), float.
        value: array of shape (..., keys, key_heads, value_depth), float.
        rope: called as `rope(x)` or `rope(x, positions)` with an array of shape (..., length,
            depth) and positions of shape (length,), and returns an array like it: an `nnx.RoPE`,
            or a function.
        input_positions: array of shape (length,), or one that broadcasts to (..., length), of both
            queries and keys; None for those that `rope` has, 0, 1, 2, .... In flax 0.12.12 the
            function of flax.nnx raises for positions.
        **kwargs: what `dot_product_attention` takes.

    Returns:
        Array of shape (..., queries, heads, value_depth), in `dtype` or the promoted dtype.

    Raises:
        ValueError: the positions do not fit the queries and the keys; or as for
            `dot_product_attention`.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))
        >>> def rope(x, positions=None):
        ...     places = jnp.arange(x.shape[-2]) if positions is None else positions
        ...     z = jax.lax.complex(*jnp.split(x, 2, -1)) * jnp.exp(1j * places)[:, None]
        ...     return jnp.concatenate([z.real, z.imag], -1)
        >>> fcg.dot_product_attention_with_rope(q, k, v, rope=rope, is_causal=True).shape
        (2, 10, 4, 8)

    Source: arXiv:2104.09864
    """
    query, key = (_rotated(x, rope, input_positions) for x in (query, key))
    return dot_product_attention(query, key, value, **kwargs)


def _rotated(x: jax.Array, rope: Callable[..., jax.Array], positions: Any) -> jax.Array:
    """Queries or keys, with each head rotated."""
    heads = jnp.moveaxis(jnp.asarray(x), -2, -3)
    if positions is None:
        return jnp.moveaxis(rope(heads), -3, -2)
    positions, places = jnp.asarray(positions), (*heads.shape[:-3], heads.shape[-2])
    if not positions.ndim or not broadcasts(positions.shape, places):
        raise ValueError(
            f"dot_product_attention_with_rope: input_positions has shape {positions.shape}, which "
            f"does not fit queries or keys of shape {x.shape}: write one of shape "
            f"({places[-1]},) or {places}"
        )
    rotate = rope
    if positions.ndim > 1:
        positions = jnp.broadcast_to(positions, places)
        for _ in places[:-1]:
            rotate = jax.vmap(rotate)
    return jnp.moveaxis(rotate(heads, positions), -3, -2)
