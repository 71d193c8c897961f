"""Blocks: an axis as which block, and which place in it; and how a format scales them.

    split   x[..., i, ...]  ->  x[..., i // size, i % size, ...],  filled up with zeros
    join    back, without what was filled up

Zeros raise no largest element and add nothing to a product, so that any size of an axis will do.
Where devices of a mesh with Explicit axes split blocks, each takes the whole axis.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from flax_customgrad.numerics.sharding import explicit_sharding


class Scaled(NamedTuple):
    """An array in blocks of elements, each block with a scale.

    Attributes:
        elements: float array of values that elements can have, in blocks.
        scales: uint8 codes of the scales, of size 1 along the places in a block.
        factor: what multiplies all of them, float without axes; None for 1.
    """

    elements: jax.Array
    scales: jax.Array
    factor: jax.Array | None = None


@dataclass(frozen=True)
class Format(ABC):
    """How an array is put into elements and scales.

    Attributes:
        element: the format of the elements.
        size: how many elements along an axis share a scale.
    """

    element: Any
    size: int

    @abstractmethod
    def quantize(self, x: jax.Array, axes: Sequence[int], noise: jax.Array | None = None) -> Scaled:
        """Scales blocks and rounds them to elements.

        Args:
            x: array of any shape, float32 or float64.
            axes: the axes along which the blocks lie.
            noise: uniform in [0, 1), of the same shape, to round at random; None for the nearest.
        """

    @abstractmethod
    def values(self, scaled: Scaled) -> jax.Array:
        """What elements and scales stand for, in blocks."""

    # Compiled as one, also outside of a trace: op by op it would be 60 small programs.
    @functools.partial(jax.jit, static_argnames=("self", "axes"))
    def rounded(
        self, x: jax.Array, axes: tuple[int, ...], noise: jax.Array | None = None
    ) -> jax.Array:
        """An array as what its elements and scales stand for; the arguments are `quantize`'s."""
        return join(self.values(self.quantize(x, axes, noise)), axes, jax.typeof(x))


def split(x: jax.Array, axes: Sequence[int], size: int) -> jax.Array:
    """Makes two axes of each: which block, and the place in it.

    Args:
        x: array of any shape.
        axes: which axes, none negative.
        size: of a block.
    """
    for axis in sorted(axes, reverse=True):
        x = _split(x, axis, size)
    return x


def places(axes: Sequence[int]) -> tuple[int, ...]:
    """The axes of a split array that are places in a block."""
    return tuple(axis + k + 1 for k, axis in enumerate(sorted(axes)))


def join(blocks: jax.Array, axes: Sequence[int], like: Any) -> jax.Array:
    """Undoes `split`.

    Args:
        blocks: array in blocks.
        axes: which axes were split.
        like: type of the array that was split: its shape, and on a mesh its sharding.
    """
    shape, sharding = list(blocks.shape), explicit_sharding(jax.typeof(blocks))
    spec = [None] * blocks.ndim if sharding is None else list(sharding.spec)
    for place in reversed(places(axes)):
        shape[place - 1 : place + 1] = [shape[place - 1] * shape[place]]
        del spec[place]
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    whole = lax.reshape(blocks, shape, out_sharding=sharding)
    x = lax.slice(whole, (0,) * like.ndim, like.shape) if whole.shape != like.shape else whole
    return x if sharding is None else jax.sharding.reshard(x, like.sharding)


def as_rows(x: jax.Array) -> jax.Array:
    """The leading axes as one: rows.

    Args:
        x: array of shape (..., n). On a mesh with Explicit axes the rows are split over devices
            as the first axis was, if no other leading axis was split.

    Returns:
        Array of shape (rows, n).
    """
    sharding = explicit_sharding(jax.typeof(x))
    if sharding is not None:
        first, *others = *sharding.spec[:-1], None
        rows = first if not any(others) else None
        sharding = NamedSharding(sharding.mesh, PartitionSpec(rows, sharding.spec[-1]))
    return lax.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]), out_sharding=sharding)


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    sharding = explicit_sharding(jax.typeof(x))
    if sharding is not None:
        spec = list(sharding.spec)
        if sharding.shard_shape(x.shape)[axis] % size:
            spec[axis] = None
            x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
        spec.insert(axis + 1, None)
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    if missing := -x.shape[axis] % size:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    shape = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    return lax.reshape(x, shape, out_sharding=sharding)
