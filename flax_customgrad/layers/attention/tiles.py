"""Tiles: the rectangles of scores that attention computes one at a time.

A tile is a range of queries and a range of keys; what a band masks throughout is in no tile. Short
sequences are one tile. Longer ones have tiles of one size, over which a `lax.scan` runs: neither
the program nor its memory beyond arguments and results grows with their length. Written out, tiles
that are exactly as wide as the band take as long, 7 times the memory, and 4 times as long to
compile (causal, 1024 queries, on a CPU).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.attention.band import Band
from flax_customgrad.numerics.argument_checks import is_integer

Carry = TypeVar("Carry")

TileSize = int | tuple[int, int] | None
"""How many queries and keys a tile has; an integer counts for both."""

_SIDE = 256
"""The most queries and keys of a tile; of few queries a tile has more keys, and of few keys more
queries, so that it has as many scores."""


class Tile(NamedTuple):
    """A tile: its first query and key, which a scan traces, and how many it has."""

    row: Any
    key: Any
    n_rows: int
    n_keys: int


@dataclass(frozen=True)
class Tiling:
    """The tiles of a call.

    Attributes:
        starts: the first query and key of each tile, by queries and then by keys.
        size: how many queries and keys a tile has.
        n_rows: the number of queries, with those that fill up the last tile.
        n_keys: the number of keys, with those that fill up the last tile.
    """

    starts: tuple[tuple[int, int], ...]
    size: tuple[int, int]
    n_rows: int
    n_keys: int

    @classmethod
    def of(
        cls, n_rows: int, n_keys: int, band: Band, size: tuple[int, int] | None = None
    ) -> "Tiling":
        """Lays out the tiles.

        Args:
            n_rows: the number of queries.
            n_keys: the number of keys.
            band: what a query sees.
            size: the most queries and keys of a tile; None to choose.
        """
        most_rows, most_keys = size or _most(n_rows, n_keys)
        rows, keys = _even(n_rows, most_rows), _even(n_keys, most_keys)
        starts = []
        for row in range(0, n_rows, rows):
            first, last = band.keys(row, min(row + rows, n_rows), n_keys)
            if last > first:
                starts += [(row, key) for key in range(first // keys * keys, last, keys)]
        return cls(tuple(starts), (rows, keys), _up_to(n_rows, rows), _up_to(n_keys, keys))

    @property
    def single(self) -> Tile | None:
        """The tile, where there is one alone; else None."""
        return Tile(*self.starts[0], *self.size) if len(self.starts) == 1 else None

    def walk(self, step: Callable[[Carry, Tile], Carry], carry: Carry) -> Carry:
        """Takes a step for each tile.

        Args:
            step: takes what the last one returned, and a tile.
            carry: a tree of arrays, what the first step takes.

        Returns:
            What the last step returned.
        """
        if not self.starts:
            return carry
        if self.single is not None:
            return step(carry, self.single)

        def body(carry: Carry, start: jax.Array) -> tuple[Carry, None]:
            return step(carry, Tile(start[0], start[1], *self.size)), None

        return lax.scan(body, carry, jnp.array(self.starts, jnp.int32))[0]


def parse_tile_size(size: Any) -> tuple[int, int] | None:
    """The size of a tile as a caller gives it.

    Args:
        size: None, a positive integer, or a pair of them.

    Raises:
        ValueError: it is none of these.
    """
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or not all(is_integer(n) and n > 0 for n in pair):
        raise ValueError(
            f"dot_product_attention: tile_size={size!r} must be the number of queries and keys "
            "that are computed at a time, one for both or a pair, or None"
        )
    return int(pair[0]), int(pair[1])


def _most(n_rows: int, n_keys: int) -> tuple[int, int]:
    """The most queries and keys of a tile, where the caller does not say."""
    few_rows, few_keys = (min(max(n, 1), _SIDE) for n in (n_rows, n_keys))
    return _SIDE * _SIDE // few_keys, _SIDE * _SIDE // few_rows


def _even(n: int, most: int) -> int:
    """How many of n are in each part, if there are as few parts as possible, of one size."""
    if n <= most:
        return max(n, 1)
    return min(_up_to(-(-n // -(-n // most)), 8), most)


def _up_to(n: int, multiple: int) -> int:
    """The least multiple that is not below n."""
    return -(-n // multiple) * multiple
