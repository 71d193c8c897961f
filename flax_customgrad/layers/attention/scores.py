"""The scores of attention a tile at a time, the same in the forward and in the backward.

A score is `scale q k + bias`, with `scale` 1 / sqrt(D), and minus infinity where a query does not
see a key.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.attention.attention_dropout import Dropout
from flax_customgrad.layers.attention.band import Band
from flax_customgrad.layers.attention.heads import Heads, merge_queries, split_queries
from flax_customgrad.layers.attention.tiles import Tile, Tiling
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.sharding import varying_alike

Carry = TypeVar("Carry")


@dataclass(frozen=True)
class AttentionConfig:
    """The choices of attention that are not arrays.

    Attributes:
        band: which keys a query sees by its place.
        dropout: of the weights, or None.
        precision: `jax.lax.Precision` of every product.
        tile_size: queries and keys of a tile, None to choose.
    """

    band: Band = field(default_factory=Band)
    dropout: Dropout | None = None
    precision: Any = None
    tile_size: tuple[int, int] | None = None


class Scores:
    """The scores of one call.

    Attributes:
        heads: the arguments with their heads in front, filled up to whole tiles.
        tiling: the tiles.
        config: the choices that are not arrays.
        dtype: that of scores, weights and sums.
        scale: what products of queries and keys are multiplied by.
    """

    def __init__(self, config: AttentionConfig, *arguments: Any):
        """Takes the arguments of `attention`; its configuration comes first."""
        *arrays, self._key = arguments
        heads = Heads.of(*arrays)
        *lead, n_rows, depth = heads.q.shape
        n_keys = heads.k.shape[-2]
        self.config = config
        self.tiling = Tiling.of(n_rows, n_keys, config.band, config.tile_size)
        self.heads = heads.resized(self.tiling.n_rows, self.tiling.n_keys)
        self.dtype = accumulator(heads.q)
        self.scale = 1 / math.sqrt(max(depth, 1))
        self._shape = (*lead, n_rows, n_keys)
        self._varying = jax.tree.leaves(arrays)

    def walk(self, step: Callable[[Carry, Tile], Carry], carry: Carry, *others: jax.Array) -> Carry:
        """Takes a step for each tile.

        Args:
            step: takes what the last one returned, and a tile.
            carry: a tree of arrays, what the first step takes.
            *others: arrays that the steps use beside the arguments of the call.
        """
        carry, *_ = varying_alike((carry, self._varying, others))
        return self.tiling.walk(step, carry)

    def of(self, part: Heads, tile: Tile) -> jax.Array:
        """The scores of a tile.

        Args:
            part: the heads of the tile.
            tile: where it is.

        Returns:
            Array of shape (..., K, G, n_rows, n_keys), float32 or wider.
        """
        s = self.scale * self.product("...knd,...ksd->...kns", part.q, part.k)
        if part.bias is not None:
            s = s + part.bias.astype(self.dtype)
        seen: Any = self._sees(tile)
        if part.mask is not None:
            seen = jnp.logical_and(seen, part.mask)
        if part.segments is not None:
            seen = jnp.logical_and(seen, part.segments[0] == part.segments[1])
        return s if seen is True else jnp.where(seen, s, -jnp.inf)

    def product(self, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """A product whose factors have the dtype of the call, and its result the wider one.

        Args:
            equation: of `jnp.einsum`, in which n stands for the axes G and T. As two axes they
                would have XLA write the scores down once more, turned.
            a: the first factor.
            b: the second.
        """
        *operands, result = equation.replace("->", ",").split(",")
        a, b = (
            merge_queries(x.astype(self.heads.q.dtype), axes)
            for x, axes in zip((a, b), operands, strict=True)
        )
        product = jnp.einsum(
            equation, a, b, precision=self.config.precision, preferred_element_type=self.dtype
        )
        return split_queries(product, result, self.heads.q.shape[-3])

    def dropped(self, p: jax.Array, tile: Tile) -> jax.Array:
        """The weights of a tile, or their cotangent, times z."""
        dropout = self.config.dropout
        if dropout is None:
            return p
        keep = dropout.keep(self._key, self._shape, tile)
        return jnp.where(keep, p / dropout.keep_prob, 0)

    def _sees(self, tile: Tile) -> jax.Array | bool:
        """Whether a query of a tile sees a key by their places; True where all see all."""
        size = tile.n_rows, tile.n_keys
        keys = tile.key + lax.broadcasted_iota(jnp.int32, size, 1)
        seen = self.config.band.sees(tile.row + lax.broadcasted_iota(jnp.int32, size, 0), keys)
        if self.tiling.n_keys == self._shape[-1]:
            return seen
        return jnp.logical_and(seen, keys < self._shape[-1])
