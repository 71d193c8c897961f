"""The catalogue's entries of the attention family."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.attention.attention import attention
from flax_customgrad.layers.attention.dot_product_attention import dot_product_attention
from flax_customgrad.layers.attention.dot_product_attention_with_rope import (
    dot_product_attention_with_rope,
    rope_of_nnx,
)
from flax_customgrad.layers.attention.multi_head_attention import MultiHeadAttention
from flax_customgrad.registry.entry import Entry, Example
from flax_customgrad.registry.examples import RANDOM_BIAS, applied, made, normal

# Without dropout nnx rounds the softmax of float64 to float32; with a rate, and nothing dropped,
# it does not.
_EXACT: dict[str, Any] = {"dropout_rate": 0.5, "deterministic": True}


def _qkv(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], **kwargs: Any) -> Any:
    return tuple(partial(normal, *shape, **kwargs) for shape in (q, k, v))


def _packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array,
    key_segment_ids: jax.Array,
    *,
    function: Any,
    **kwargs: Any,
) -> jax.Array:
    return function(
        q,
        k,
        v,
        bias,
        mask,
        segment_ids=segment_ids,
        key_segment_ids=key_segment_ids,
        **kwargs,
    )


def _several_tiles(**kwargs: Any) -> Example:
    """All that attention takes but dropout; every query sees a key."""

    def make(function: Any) -> tuple[Any, ...]:
        # Two of four heads share keys; a mask hides one key of each example.
        q, k, v = (x() for x in _qkv((8, 5, 4, 3), (8, 6, 2, 3), (8, 6, 2, 7)))
        mask = jnp.arange(6) != jnp.arange(8)[:, None, None, None] % 6
        segments = jnp.array([0, 0, 0, 1, 1]), jnp.array([0, 0, 0, 1, 1, 1])
        call = partial(_packed, function=function, **kwargs)
        return (call, q, k, v, normal(4, 5, 6), mask, *segments)

    return make


def _causal(layer: Any, x: jax.Array) -> jax.Array:
    return layer(x, is_causal=True)


def _shared_draws(function: Any) -> tuple[Any, ...]:
    dropped = partial(function, dropout_rate=0.3, dropout_rng=jax.random.key(0))
    return (dropped, *(x() for x in _qkv((8, 5, 2, 3), (8, 6, 2, 3), (8, 6, 2, 7))))


def _rope(x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
    """Rotates pairs of features by an angle that grows with the place."""
    places = jnp.arange(x.shape[-2]) if positions is None else positions
    sin, cos = (f(places / 7)[:, None].astype(x.dtype) for f in (jnp.sin, jnp.cos))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _heads(*shape: int, dtype: Any = jnp.float32) -> Any:
    return _qkv(shape, shape, shape, dtype=dtype)


ENTRIES = (
    Entry(
        "dot_product_attention",
        "attention",
        dot_product_attention,
        nnx.dot_product_attention,
        "exact",
        keeps="q, k, v, the output, and two numbers per query and head",
        gain="no array of all weights, forward or backward: 2.6 times as fast where causal, linear "
        "in the length with a window; float32 scores; 0 where a query sees no key",
        source="arXiv:2205.14135",
        examples={
            "masks, bias, groups, several tiles": _several_tiles(
                window=(2, 1), tile_size=(3, 4), **_EXACT
            ),
            "causal, more keys than queries": applied(
                *_qkv((8, 5, 2, 3), (8, 6, 2, 3), (8, 6, 2, 7)), is_causal=True, **_EXACT
            ),
            "draws that heads and examples share": _shared_draws,
        },
        operations={attention: "masks, bias, groups, several tiles"},
        workloads={
            "2x1024, 8 heads of 64, causal": applied(*_heads(2, 1024, 8, 64), is_causal=True),
            "2x1024, 8 heads of 64": applied(*_heads(2, 1024, 8, 64)),
            "1x4096, 8 heads of 64, causal": applied(*_heads(1, 4096, 8, 64), is_causal=True),
            "2x1024, 8 heads of 64, causal, bf16": applied(
                *_heads(2, 1024, 8, 64, dtype=jnp.bfloat16), is_causal=True
            ),
            "32x128, 8 heads of 64": applied(*_heads(32, 128, 8, 64)),
        },
    ),
    Entry(
        "dot_product_attention_with_rope",
        "attention",
        dot_product_attention_with_rope,
        rope_of_nnx,
        "exact",
        keeps="what `dot_product_attention` keeps; cosines and sines",
        gain="no array of all weights; positions of each example",
        source="arXiv:2104.09864",
        examples={
            "causal, grouped heads": applied(
                *_qkv((8, 5, 4, 6), (8, 5, 2, 6), (8, 5, 2, 3)),
                rope=_rope,
                is_causal=True,
                **_EXACT,
            ),
        },
        workloads={
            "2x1024, 8 heads of 64, causal": applied(
                *_heads(2, 1024, 8, 64), rope=_rope, is_causal=True
            ),
        },
    ),
    Entry(
        "MultiHeadAttention",
        "attention",
        MultiHeadAttention,
        nnx.MultiHeadAttention,
        "exact",
        keeps="its inputs; q, k, v, the output of the heads, and two numbers per query and head",
        gain="no array of all weights: eight causal layers of 2x1024x512 in a scan, 1489 MB -> 226 "
        "MB; float32 sums in the gradients of the projections",
        source="arXiv:1706.03762",
        examples={
            # Without normalization the bias of keys changes nothing: its gradient is rounding.
            "causal, grouped heads": made(
                4,
                6,
                20,
                num_kv_heads=2,
                use_bias=False,
                decode=False,
                **_EXACT,
                call=_causal,
                inputs=(lambda: normal(8, 7, 6),),
            ),
            "normalized, biases": made(
                4,
                6,
                20,
                3,
                normalize_qk=True,
                decode=False,
                **RANDOM_BIAS,
                **_EXACT,
                inputs=(lambda: normal(8, 7, 6),),
            ),
        },
        workloads={
            "2x1024x512, 8 heads, causal": made(
                8,
                512,
                decode=False,
                call=_causal,
                inputs=(lambda: normal(2, 1024, 512),),
            ),
        },
    ),
)
