"""Attention: each query's mean of the values, weighted by the softmax of its scores.

    forward   s = scale q k + bias,  scale = 1 / sqrt(D)     -inf where a query does not see a key
              m = max s,  l = sum exp(s - m)                 over the keys of a query
              p = exp(s - m) / l
              o = sum z p v                  z is 1; with dropout 0, or 1 / the part that is kept
    backward  dv    = sum z p g              over the queries
              dp    = z (g v)
              ds    = p (dp - delta),  delta = sum p dp = g o
              dq    = scale sum ds k,  dk = scale sum ds q,  dbias = ds
    kept      q, k, v, what masks them, o, and two numbers per query and head, m and l

The backward, step by step, for one query; k and j number the keys:

    o         = sum_k z_k p_k v_k
    dv_k      = z_k p_k g,  dp_k = z_k (g v_k)
    ∂p_k/∂s_j = p_k ((k = j) - p_j)                     the softmax
    ds_j      = sum_k dp_k ∂p_k/∂s_j = p_j (dp_j - sum_k p_k dp_k)
    delta     = sum_k p_k dp_k = g sum_k z_k p_k v_k = g o

The last line is why o is kept: it replaces a sum over all keys, which tiles would have to wait for.

Scores exist a tile at a time (`tiles`, `scores`). The forward meets the tiles of a query one after
the other: where one of them has a larger maximum, m becomes it, and what was summed so far shrinks
by the exponential of the difference. Of a single tile, which short sequences are, m is the maximum
at once. The backward computes scores, weights and the draws of dropout again, tile by tile. It
could do with one number, m + log l; but where scores are in the hundreds that has lost digits of
log l, and weights would be off by 1e-5. Scores, weights and all sums are in float32 or wider; in
half precision the factors of a product are rounded to it.

A query that sees no key, because of masks or of a bias of minus infinity, has output 0 and
gradient 0.

Source: arXiv:1706.03762, arXiv:1805.02867 (the running maximum), arXiv:2205.14135 (tiles)
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.attention.heads import (
    Segments,
    add,
    add_tile,
    join_heads,
    put,
    resize,
    split_heads,
    take,
    turn,
)
from flax_customgrad.layers.attention.scores import AttentionConfig, Scores
from flax_customgrad.layers.attention.tiles import Tile
from flax_customgrad.numerics.broadcasting import sum_to_shape
from flax_customgrad.numerics.inline_jit import inline_jit
from flax_customgrad.numerics.sharding import explicit_spec, with_auto_axes


class Residuals(NamedTuple):
    """What the backward of `attention` keeps: its arguments, its output, and m and l."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None
    segments: Segments
    key: jax.Array | None
    o: jax.Array
    m: jax.Array
    l: jax.Array
    config: AttentionConfig


@custom_vjp
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    segments: Segments,
    key: jax.Array | None,
    config: AttentionConfig,
) -> jax.Array:
    """Attends to values.

    Args:
        q: queries of shape (..., T, N, D), float.
        k: keys of shape (..., S, K, D), in the dtype of q; each of the K heads is that of N / K
            heads of queries.
        v: values of shape (..., S, K, E), in the dtype of q.
        bias: float array that broadcasts to (..., N, T, S), or None.
        mask: bool array that broadcasts to (..., N, T, S): which keys a query sees; or None.
        segments: integers that broadcast to (..., T) and to (..., S): a query sees the keys with
            its own number; or None.
        key: of the draws of dropout, or None.
        config: the choices that are not arrays.

    Returns:
        Array of shape (..., T, N, E), in the dtype of q.
    """
    return _forward(config, q, k, v, bias, mask, segments, key)[0]


def _fwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    segments: Segments,
    key: jax.Array | None,
    config: AttentionConfig,
) -> tuple[jax.Array, Residuals]:
    o, m, l = _forward(config, q, k, v, bias, mask, segments, key)
    return o, Residuals(q, k, v, bias, mask, segments, key, o, m, l, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[Any, ...]:
    q, k, v, bias, *_, o, m, l, config = res
    *batch, T, N, D = q.shape
    S, K, E = v.shape[-3:]
    chex.assert_shape([q, k, v], [(*batch, T, N, D), (*batch, S, K, D), (*batch, S, K, E)])
    chex.assert_shape([o, g], (*batch, T, N, E))
    chex.assert_shape([m, l], (*batch, K, N // K, T))
    dq, dk, dv, dbias = _backward(config, *res[:-1], g)
    chex.assert_trees_all_equal_shapes((dq, dk, dv, dbias), (q, k, v, bias))
    return dq, dk, dv, dbias, None, None, None, None


attention.defvjp(_fwd, _bwd)


@inline_jit()
def _forward(config: AttentionConfig, *args: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The output, and m and l of shape (..., K, G, T), of the arguments of `attention`."""
    q, k, *_ = args
    *batch, place, heads, _ = explicit_spec(q)
    # Of fewer heads of keys there may be fewer than devices that share those of the queries.
    of_keys = heads if k.shape[-2] == q.shape[-2] else None
    of_rows = PartitionSpec(*batch, of_keys, None, place)
    specs = PartitionSpec(*batch, place, heads, None), of_rows, of_rows
    return with_auto_axes(functools.partial(_attend, config), specs, *args)


def _attend(config: AttentionConfig, *args: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    scores = Scores(config, *args)
    tile = scores.tiling.single
    m, l, o = _attend_by_tiles(scores) if tile is None else _attend_at_once(scores, tile)
    m, l, o = (resize(a, args[0].shape[-3], -2) for a in (m, l, o))
    return join_heads(o).astype(args[0].dtype), m[..., 0], l[..., 0]


def _attend_at_once(scores: Scores, tile: Tile) -> tuple[jax.Array, jax.Array, jax.Array]:
    """m, l and o where one tile has all scores; l is not 0 where a query sees no key."""
    part = scores.heads.tile(tile)
    s = scores.of(part, tile)
    m = lax.stop_gradient(jnp.max(s, -1, keepdims=True))
    m = jnp.maximum(m, jnp.finfo(s.dtype).min)
    e = jnp.exp(s - m)
    # Where it sees one, an exponential is 1.
    l = jnp.maximum(jnp.sum(e, -1, keepdims=True), 0.5)
    # Divided by l before they are multiplied, weights are a softmax: where nothing asks for m and l
    # XLA on a CPU hands it to a library whole, in half precision with both products.
    p = scores.dropped(e / l, tile)
    return m, l, scores.product("...kns,...kse->...kne", p, part.v)


def _attend_by_tiles(scores: Scores) -> tuple[jax.Array, jax.Array, jax.Array]:
    """m, l and o, a tile after the other; l is not 0 either."""
    heads, lowest = scores.heads, jnp.finfo(scores.dtype).min

    def step(carry: Any, tile: Tile) -> Any:
        m, l, o = (take(a, tile.row, tile.n_rows) for a in carry)
        part = heads.tile(tile)
        s = scores.of(part, tile)
        m_new = jnp.maximum(m, lax.stop_gradient(jnp.max(s, -1, keepdims=True)))
        shrink, p = jnp.exp(m - m_new), jnp.exp(s - m_new)
        l = shrink * l + jnp.sum(p, -1, keepdims=True)
        zp = scores.dropped(p, tile)
        o = shrink * o + scores.product("...kns,...kse->...kne", zp, part.v)
        return tuple(put(a, new, tile.row) for a, new in zip(carry, (m_new, l, o), strict=True))

    rows = heads.q.shape[:-1]
    m = jnp.full((*rows, 1), lowest, scores.dtype)
    l, o = jnp.zeros_like(m), jnp.zeros((*rows, heads.v.shape[-1]), scores.dtype)
    m, l, o = scores.walk(step, (m, l, o))
    l = jnp.where(l == 0, 1, l)
    return m, l, o / l


@inline_jit()
def _backward(config: AttentionConfig, *args: Any) -> tuple[Any, ...]:
    """The cotangents of q, k, v and bias; behind the arguments come o, m, l and g."""
    specs = tuple(None if a is None else explicit_spec(a) for a in args[:4])
    return with_auto_axes(functools.partial(_cotangents, config), specs, *args)


def _cotangents(config: AttentionConfig, *args: Any) -> tuple[Any, ...]:
    *arguments, o, m, l, g = args
    q, k, v, bias, *_ = arguments
    scores = Scores(config, *arguments)
    heads, n_rows, wide = scores.heads, scores.tiling.n_rows, scores.dtype
    delta = jnp.sum(o.astype(wide) * g.astype(wide), -1, keepdims=True)
    g, delta = (split_heads(a, k.shape[-2]) for a in (g, delta))
    # What fills up the last tile of queries has no weights.
    fills = (0, 0, jnp.finfo(wide).max, 1)
    by_row = tuple(
        resize(a, n_rows, -2, fill)
        for a, fill in zip((g, delta, m[..., None], l[..., None]), fills, strict=True)
    )
    # q and g as they enter dk and dv, the sums over queries.
    turned = tuple(turn(a) for a in (heads.q, by_row[0]))

    def step(carry: Any, tile: Tile) -> Any:
        dq, dk, dv, dbias = carry
        part = heads.tile(tile)
        q_turned, g_turned = (take(a, tile.row, tile.n_rows, -1) for a in turned)
        g, delta, m, l = (take(a, tile.row, tile.n_rows) for a in by_row)
        p = jnp.exp(scores.of(part, tile) - m) / l
        zp = scores.dropped(p, tile)
        dp = scores.dropped(scores.product("...kne,...kse->...kns", g, part.v), tile)
        ds = p * (dp - delta)
        if part.bias is not None:
            dbias = add_tile(dbias, sum_to_shape(ds, part.bias.shape), tile)
        return (
            add(dq, scores.product("...kns,...ksd->...knd", ds, part.k), tile.row),
            add(dk, scores.product("...kdn,...kns->...kds", q_turned, ds), tile.key, -1),
            add(dv, scores.product("...ken,...kns->...kes", g_turned, zp), tile.key, -1),
            dbias,
        )

    shapes = heads.q, heads.k.mT, heads.v.mT, heads.bias
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, wide), shapes)
    dq, dk, dv, dbias = scores.walk(step, zeros, g)
    dq = scores.scale * join_heads(resize(dq, q.shape[-3], -2))
    dk, dv = (jnp.moveaxis(resize(a, k.shape[-3], -1), -1, -3) for a in (dk, dv))
    dk = scores.scale * dk
    if dbias is not None:
        dbias = resize(resize(dbias, q.shape[-3], -2), k.shape[-3], -1).reshape(bias.shape)
    return jax.tree.map(lambda d, a: d.astype(a.dtype), (dq, dk, dv, dbias), (q, k, v, bias))
