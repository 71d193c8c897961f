"""dot_product_attention: the function of flax.nnx, with sliding windows and packed sequences.

What it computes and how it is differentiated is in `attention`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, PrecisionLike, PromoteDtypeFn
from jax.typing import ArrayLike

from flax_customgrad.layers.attention.attention import attention
from flax_customgrad.layers.attention.attention_dropout import Dropout
from flax_customgrad.layers.attention.band import Band, Window
from flax_customgrad.layers.attention.cudnn import attention_by_cudnn
from flax_customgrad.layers.attention.heads import Segments
from flax_customgrad.layers.attention.scores import AttentionConfig
from flax_customgrad.layers.attention.tiles import TileSize, parse_tile_size
from flax_customgrad.numerics.argument_checks import check_word
from flax_customgrad.numerics.broadcasting import broadcasts
from flax_customgrad.numerics.dtypes import as_array, is_supported_float, takes_custom_backward
from flax_customgrad.numerics.interception import products_are_intercepted
from flax_customgrad.numerics.sizes import is_known

of_nnx = nnx.dot_product_attention
"""The function of flax.nnx, whose name in `flax.nnx` a user may give to ours."""


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Dtype | None = None,
    precision: PrecisionLike = None,
    module: nnx.Module | None = None,
    promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
    is_causal: bool = False,
    *,
    window: Window = None,
    segment_ids: ArrayLike | None = None,
    key_segment_ids: ArrayLike | None = None,
    tile_size: TileSize = None,
    implementation: Literal["tiles", "cudnn"] = "tiles",
) -> jax.Array:
    """Each query's mean of the values, weighted by the softmax of its products with the keys.

    `nnx.dot_product_attention` that never holds the weights of all queries: neither its memory nor
    what its backward keeps grows with the product of the lengths. What causality or a window masks
    throughout is not computed. Scores, softmax and sums are in float32 or wider.

    It computes as nnx does, and JAX differentiates that, where `module` asks for the weights, for
    integer or complex arrays, and where a tool has replaced the products of JAX. A query that sees
    no key has output 0 and gradient 0, where nnx gives the mean of the values.

    Args:
        query: array of shape (..., queries, heads, depth).
        key: array of shape (..., keys, key_heads, depth). Each of its heads is that of as many
            consecutive heads of the queries, `heads / key_heads`.
        value: array of shape (..., keys, key_heads, value_depth).
        bias: float array that is added to the scores and broadcasts to (..., heads, queries,
            keys), or None. Minus infinity masks.
        mask: array that broadcasts to that shape: which keys a query sees, or None.
        broadcast_dropout: whether heads and examples share the draws of dropout.
        dropout_rng: the key of the draws, or None. With a key of JAX's default kind, `threefry`,
            they are those of nnx; with another where the sequence is one tile.
        dropout_rate: the part of the weights that is dropped, in [0, 1).
        deterministic: whether nothing is dropped.
        dtype: dtype of the computation; None for that which the arrays promote to.
        precision: `jax.lax.Precision` of every product, forward and backward.
        module: the Module that is to sow the weights, or None.
        promote_dtype: function that promotes query, key and value.
        is_causal: whether query i sees keys up to i alone.
        window: query i sees keys from i - left to i + right, for a pair (left, right); None in
            its place is no bound, and one number stands for both.
        segment_ids: integer array that broadcasts to (..., queries): a query sees the keys with its
            own number, as of sequences packed into one; or None.
        key_segment_ids: integer array that broadcasts to (..., keys); None where queries and keys
            have the same.
        tile_size: how many queries and keys are computed at a time, one number or a pair; None to
            choose. Larger tiles take more memory.
        implementation: "tiles": this library's, everywhere. "cudnn": the kernels that
            `jax.nn.dot_product_attention` calls on GPUs of NVIDIA, forward and backward, for half
            precision; they drop nothing, and what a query without keys gets is theirs to say.

    Returns:
        Array of shape (..., queries, heads, value_depth), in `dtype` or the promoted dtype.

    Raises:
        ValueError: shapes do not fit; a window or a size is negative; there are numbers of segments
            for the keys alone, or for queries alone where there are not as many keys; dropout lacks
            its key, or its rate is not in [0, 1); the implementation is neither of these words, or
            "cudnn" with dropout or float32.
        RuntimeError: "cudnn" where JAX finds none.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 1000, 4, 8))
        >>> fcg.dot_product_attention(q, k, v, is_causal=True, window=100).shape
        (2, 1000, 4, 8)

    Source: arXiv:1706.03762, arXiv:2205.14135
    """
    q, k, v, bias, mask = map(as_array, (query, key, value, bias, mask))
    q, k, v = promote_dtype((q, k, v), dtype=dtype)  # type: ignore[misc]
    segments = _segments(q, k, segment_ids, key_segment_ids)
    window_only, band = Band.of(window, False), Band.of(window, is_causal)
    dropout = _dropout(dropout_rate, broadcast_dropout, deterministic, dropout_rng)
    size = parse_tile_size(tile_size)
    check_word("dot_product_attention", "implementation", implementation, ("tiles", "cudnn"))
    if module is not None or not _has_custom_backward(q, k, v, bias, mask, segments):
        return of_nnx(
            query,
            key,
            value,
            bias,
            _with_mask(mask, q, k, window_only, segments),
            broadcast_dropout,
            dropout_rng,
            dropout_rate,
            deterministic,
            dtype,
            precision,
            module,
            promote_dtype,
            is_causal,
        )
    if isinstance(precision, list):  # one for each factor; JAX takes a list too
        precision = tuple(precision)  # type: ignore[assignment]
    mask = None if mask is None else mask.astype(bool)
    if implementation == "cudnn":
        _check_cudnn(q, dropout)
        # Its kernels know windows of causal queries, and get any other as a mask.
        mask = _with_mask(mask, q, k, Band() if is_causal else window_only, segments)
        left = band.left if is_causal else None
        return attention_by_cudnn(q, k, v, bias, mask, is_causal, left)
    config = AttentionConfig(band, dropout, precision, size)
    return attention(q, k, v, bias, mask, segments, dropout and dropout_rng, config)


def _segments(q: jax.Array, k: jax.Array, of_queries: Any, of_keys: Any) -> Segments:
    """The numbers of segments; those of the queries stand for the keys, too."""
    if of_queries is None and of_keys is None:
        return None
    if of_queries is None or (of_keys is None and q.shape[-3] != k.shape[-3]):
        raise ValueError(
            f"dot_product_attention: {q.shape[-3]} queries and {k.shape[-3]} keys: give both "
            "segment_ids, of the queries, and key_segment_ids"
        )
    of_keys = of_queries if of_keys is None else of_keys
    pair = jnp.asarray(of_queries), jnp.asarray(of_keys)
    for name, ids, array in zip(("segment_ids", "key_segment_ids"), pair, (q, k), strict=True):
        if not broadcasts(ids.shape, array.shape[:-2]) or jnp.issubdtype(ids.dtype, jnp.inexact):
            raise ValueError(
                f"dot_product_attention: {name} has shape {ids.shape} and dtype {ids.dtype}; write "
                f"integers of shape {array.shape[:-2]}, or what broadcasts to it"
            )
    return pair


def _dropout(rate: Any, is_shared: bool, deterministic: bool, key: Any) -> Dropout | None:
    """The dropout of a call, None where nothing is dropped."""
    if not 0 <= rate < 1:
        raise ValueError(f"dot_product_attention: dropout_rate={rate!r} must be in [0, 1)")
    if deterministic or rate == 0:
        return None
    if key is None:
        raise ValueError(
            f"dot_product_attention: dropout_rate={rate!r} needs a key, dropout_rng=...; or write "
            "deterministic=True"
        )
    return Dropout(float(rate), bool(is_shared))


def _check_cudnn(q: jax.Array, dropout: Dropout | None) -> None:
    if dropout is not None or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f'dot_product_attention: implementation="cudnn" of {q.dtype}'
            f"{'' if dropout is None else ' with dropout'}: its kernels take bfloat16 and float16, "
            'and drop nothing; write dtype=jnp.bfloat16 and deterministic=True, or "tiles"'
        )


def _has_custom_backward(q: Any, k: Any, v: Any, bias: Any, mask: Any, segments: Any) -> bool:
    """Whether `attention` computes what nnx would; what does not fit is left to its errors."""
    arrays = [a for a in (q, k, v, bias, mask) if a is not None]
    if not takes_custom_backward(q, k, v) or products_are_intercepted():
        return False
    if not all(isinstance(a, jax.Array) for a in arrays) or not (
        bias is None or is_supported_float(bias)
    ):
        return False
    if not (q.ndim == k.ndim == v.ndim >= 3) or not k.shape[-2]:
        return False
    # `jax.export` may leave a length symbolic; tiles are laid out for a number.
    if not all(map(is_known, (*q.shape[-3:], *k.shape[-3:], *v.shape[-3:]))):
        return False
    scores = (*q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3])
    return (
        q.shape[:-3] == k.shape[:-3] == v.shape[:-3]
        and k.shape[-3:-1] == v.shape[-3:-1]
        and q.shape[-1] == k.shape[-1]
        and q.shape[-2] % k.shape[-2] == 0
        and all(a is None or broadcasts(a.shape, scores) for a in (bias, mask))
    )


def _with_mask(mask: Any, q: Any, k: Any, window: Band, segments: Segments) -> Any:
    """A mask for nnx, which knows neither windows nor segments."""
    if window.is_everything and segments is None:
        return mask
    places = jnp.arange(q.shape[-3])[:, None], jnp.arange(k.shape[-3])
    seen = jnp.broadcast_to(window.sees(*places), (q.shape[-3], k.shape[-3]))
    if segments is not None:
        same = segments[0][..., :, None] == segments[1][..., None, :]
        seen = jnp.logical_and(seen, same[..., None, :, :])
    if mask is not None:
        seen = jnp.logical_and(seen, mask.astype(bool))
    shape = (*q.shape[:-3], *(1,) * 3)
    return jnp.broadcast_to(seen, jnp.broadcast_shapes(seen.shape, shape))
