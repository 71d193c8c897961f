"""The arguments of attention with their heads in front, and the tiles of them.

    q (..., K, G, T, D)    k (..., K, S, D)    v (..., K, S, E)    bias and mask (..., K, G, T, S)

T queries, S keys, K heads of keys and values, each for a group of G heads of queries; a bias or a
mask has 1 for an axis along which it is the same. Products with scores over all keys need no
transposition of such arrays, those over all queries none of turned ones, (..., K, D, G, T).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.attention.tiles import Tile
from flax_customgrad.numerics.platform import is_one_cpu

Segments = tuple[jax.Array, jax.Array] | None
"""The numbers of the segments that queries and keys belong to."""


class Heads(NamedTuple):
    """Queries, keys and values by head, and what is added to their scores or masks them."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None
    segments: Segments

    @classmethod
    def of(
        cls,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        bias: jax.Array | None,
        mask: jax.Array | None,
        segments: Segments,
    ) -> "Heads":
        """Puts the heads of the arguments of `attention` in front."""
        n_heads = k.shape[-2]
        if segments is not None:
            of_queries, of_keys = segments
            segments = of_queries[..., None, None, :, None], of_keys[..., None, None, None, :]
        return cls(
            split_heads(q, n_heads),
            _heads_in_front(k),
            _heads_in_front(v),
            None if bias is None else _split_scores(bias, q.ndim, n_heads),
            None if mask is None else _split_scores(mask, q.ndim, n_heads),
            segments,
        )

    def resized(self, n_rows: int, n_keys: int) -> "Heads":
        """With as many queries and keys: zeros come behind the last ones, or these are left out."""
        return Heads(
            resize(self.q, n_rows, -2),
            resize(self.k, n_keys, -2),
            resize(self.v, n_keys, -2),
            *jax.tree.map(
                lambda a: resize(resize(a, n_rows, -2), n_keys, -1),
                (self.bias, self.mask, self.segments),
            ),
        )

    def tile(self, tile: Tile) -> "Heads":
        """What the scores of a tile depend on."""
        return Heads(
            take(self.q, tile.row, tile.n_rows),
            take(self.k, tile.key, tile.n_keys),
            take(self.v, tile.key, tile.n_keys),
            *jax.tree.map(lambda a: take_tile(a, tile), (self.bias, self.mask, self.segments)),
        )


def split_heads(a: jax.Array, n_heads: int) -> jax.Array:
    """Queries, or what is like them, of shape (..., T, N, D), as (..., K, G, T, D)."""
    a = _heads_in_front(a)
    return a.reshape(*a.shape[:-3], n_heads, a.shape[-3] // n_heads, *a.shape[-2:])


def _heads_in_front(a: jax.Array) -> jax.Array:
    """An array of shape (..., T, N, D) as (..., N, T, D)."""
    a = jnp.moveaxis(a, -2, -3)
    if not is_one_cpu():
        return a
    # Barrier: XLA has no fast product in half precision of what is transposed without being
    # written down, and widens it instead.
    return lax.optimization_barrier(lax.collapse(a, 0, a.ndim - 1)).reshape(a.shape)


def join_heads(a: jax.Array) -> jax.Array:
    """The inverse of `split_heads`."""
    a = a.reshape(*a.shape[:-4], a.shape[-4] * a.shape[-3], *a.shape[-2:])
    return jnp.moveaxis(a, -3, -2)


def turn(a: jax.Array) -> jax.Array:
    """Queries, or what is like them, of shape (..., K, G, T, D), as (..., K, D, G, T)."""
    return jnp.moveaxis(a, -1, -3)


def merge_queries(a: jax.Array, axes: str) -> jax.Array:
    """An array with its axes G and T as one, where the names of its axes have an n for them."""
    if "n" not in axes:
        return a
    n = a.ndim - 2 - (axes[-1] != "n")
    return a.reshape(*a.shape[:n], a.shape[n] * a.shape[n + 1], *a.shape[n + 2 :])


def split_queries(a: jax.Array, axes: str, n_groups: int) -> jax.Array:
    """The inverse of `merge_queries`."""
    if "n" not in axes:
        return a
    n = a.ndim - 1 - (axes[-1] != "n")
    return a.reshape(*a.shape[:n], n_groups, a.shape[n] // n_groups, *a.shape[n + 1 :])


def _split_scores(a: jax.Array, ndim: int, n_heads: int) -> jax.Array:
    """A bias or a mask, which may lack axes, with all axes of scores."""
    a = lax.expand_dims(a, range(ndim - a.ndim))
    heads = (1, 1) if a.shape[-3] == 1 else (n_heads, a.shape[-3] // n_heads)
    return a.reshape(*a.shape[:-3], *heads, *a.shape[-2:])


def take(a: jax.Array, start: Any, size: int, axis: int = -2) -> jax.Array:
    """A part of an array along an axis; all of it where it has a single element there."""
    if a.shape[axis] in (1, size):
        return a
    return lax.dynamic_slice_in_dim(a, start, size, axis)


def put(a: jax.Array, part: jax.Array, start: Any, axis: int = -2) -> jax.Array:
    """An array with another part along an axis, which `take` took."""
    if a.shape[axis] == part.shape[axis]:
        return part
    return lax.dynamic_update_slice_in_dim(a, part, start, axis)


def add(a: jax.Array, part: jax.Array, start: Any, axis: int = -2) -> jax.Array:
    """An array of queries or keys to a part of which something is added."""
    return put(a, take(a, start, part.shape[axis], axis) + part, start, axis)


def take_tile(a: jax.Array, tile: Tile) -> jax.Array:
    """What is in a tile of an array of scores, which may have a single query or key."""
    return take(take(a, tile.row, tile.n_rows), tile.key, tile.n_keys, -1)


def add_tile(a: jax.Array, part: jax.Array, tile: Tile) -> jax.Array:
    """An array of scores to a tile of which something is added."""
    of_rows = take(a, tile.row, tile.n_rows)
    part = take(of_rows, tile.key, tile.n_keys, -1) + part
    return put(a, put(of_rows, part, tile.key, -1), tile.row)


def resize(a: jax.Array, size: int, axis: int, fill: Any = 0) -> jax.Array:
    """An array with more or fewer elements along an axis; the same where it has a single one."""
    more = size - a.shape[axis]
    if a.shape[axis] == 1 or not more:
        return a
    widths = [(0, 0, 0)] * a.ndim
    widths[axis] = (0, more, 0)
    return lax.pad(a, jnp.asarray(fill, a.dtype), widths)
