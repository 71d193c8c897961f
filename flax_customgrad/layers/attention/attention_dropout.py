"""Dropout of attention's weights, drawn a tile at a time: the same draws as nnx's, to the bit.

    keep[n] = hash(key, n) < keep_prob        n: the place of a weight among all of them

JAX draws the bits of an array with a `threefry` key by hashing the place of each element, so that
a tile of the draws needs its own places alone, and the backward hashes them again. A key of another
kind, or `jax_threefry_partitionable` off, has no such places: there the key of a tile is that of
the call with the tile's start folded in, and only where there is a single tile the draws are those
of nnx.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_customgrad.layers.attention.tiles import Tile


@dataclass(frozen=True)
class Dropout:
    """Which weights are dropped.

    Attributes:
        rate: the part of the weights that is dropped, in [0, 1).
        is_shared: whether heads and examples share the draws.
    """

    rate: float
    is_shared: bool

    @property
    def keep_prob(self) -> float:
        """The part of the weights that is kept."""
        return 1.0 - self.rate

    def keep(self, key: jax.Array, shape: tuple[int, ...], tile: Tile) -> jax.Array:
        """Which weights of a tile are kept.

        Args:
            key: the key of the call.
            shape: the shape of all weights, (..., K, G, T, S).
            tile: a tile of them.

        Returns:
            bool array of shape (..., K, G, n_rows, n_keys), or without the axes in front of the
            last two where these share the draws.
        """
        lead, (n_rows, n_keys) = () if self.is_shared else shape[:-2], shape[-2:]
        size = (*lead, tile.n_rows, tile.n_keys)
        if size == (*lead, n_rows, n_keys):
            return jax.random.bernoulli(key, self.keep_prob, size)
        if not _hashes_places(key):
            for start in (tile.row, tile.key):
                key = jax.random.fold_in(key, start)
            return jax.random.bernoulli(key, self.keep_prob, size)
        row = lax.broadcasted_iota(jnp.uint32, size, len(lead)) + jnp.uint32(tile.row)
        for axis in range(len(lead)):
            above = math.prod(lead[axis + 1 :]) * n_rows
            row += lax.broadcasted_iota(jnp.uint32, size, axis) * jnp.uint32(above)
        column = lax.broadcasted_iota(jnp.uint32, size, len(lead) + 1) + jnp.uint32(tile.key)
        return self._is_below(*_hash(key, *_place(row, n_keys, column)))

    def _is_below(self, high: jax.Array, low: jax.Array) -> jax.Array:
        """Whether the number in [0, 1) that JAX makes of 64 bits is less than `keep_prob`.

        It is made of the upper bits of an integer: 23 of 32, or 52 of 64 where numbers are float64.
        """
        if not jax.enable_x64.value:
            return ((high ^ low) >> 9) < jnp.uint32(math.ceil(np.float32(self.keep_prob) * 2**23))
        bound = math.ceil(self.keep_prob * 2**52)
        above, below = jnp.uint32(bound >> 20), jnp.uint32(bound & (2**20 - 1))
        return (high < above) | ((high == above) & ((low >> 12) < below))


def _hashes_places(key: jax.Array) -> bool:
    """Whether JAX draws an element of an array by hashing its place."""
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    kind = jax.random.key_impl(key) if is_typed else jax.default_prng_impl.value
    return bool(jax.threefry_partitionable.value) and str(kind) == "threefry2x32"


def _place(row: jax.Array, n: int, column: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The place `row * n + column` in 64 bits: its upper and its lower half."""
    half, ones = jnp.uint32(16), jnp.uint32(2**16 - 1)
    n_high, n_low = jnp.uint32(n >> 16), jnp.uint32(n & (2**16 - 1))
    low, first = row * jnp.uint32(n), (row & ones) * n_low
    second = (row >> half) * n_low + (first >> half)
    third = (row & ones) * n_high + (second & ones)
    high = (row >> half) * n_high + (second >> half) + (third >> half)
    place = low + column
    return high + (place < low).astype(jnp.uint32), place


def _hash(key: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The hash of each place, two integers."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    places = jnp.stack([high, low])
    bits: Any = jax.extend.random.threefry_2x32((key[0], key[1]), places)
    return bits[0], bits[1]
