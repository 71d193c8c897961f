"""Blocks: an axis as which block, and which place in it; how a format scales them, and their codes.

    split   x[..., i, ...]  ->  x[..., i // size, i % size, ...],  filled up with zeros
    join    back, without what was filled up

Zeros raise no largest element and add nothing to a product, so that any size of an axis will do.
Where devices of a mesh with Explicit axes split blocks, each takes the whole axis.

Between the passes, and in a packed layer, a matrix is a `BlockCodes`: a byte or half a byte for
each element, and a byte for the scale of each block.
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

from flax_customgrad.low_bit.microscaling.small_floats import decode_elements, encode_elements
from flax_customgrad.numerics.packing import is_packable, pack_bits, unpack_bits
from flax_customgrad.numerics.sharding import explicit_sharding
from flax_customgrad.numerics.sizes import is_known


class ScaledBlocks(NamedTuple):
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
class BlockFormat(ABC):
    """How an array is put into elements and scales.

    Attributes:
        element: the format of the elements, a dtype of 4 or 8 bits.
        size: how many elements along an axis share a scale.
    """

    element: Any
    size: int

    @abstractmethod
    def quantize(
        self, x: jax.Array, axes: Sequence[int], noise: jax.Array | None = None
    ) -> ScaledBlocks:
        """Scales blocks and rounds them to elements.

        Args:
            x: array of any shape, float32 or float64.
            axes: the axes along which the blocks lie.
            noise: uniform in [0, 1), of the same shape, to round at random; None for the nearest.
        """

    @abstractmethod
    def values(self, scaled: ScaledBlocks) -> jax.Array:
        """What elements and scales stand for, in blocks."""

    # Compiled as one, also outside of a trace: op by op it would be 60 small programs.
    @functools.partial(jax.jit, static_argnames=("self", "axes"))
    def rounded(
        self, x: jax.Array, axes: tuple[int, ...], noise: jax.Array | None = None
    ) -> jax.Array:
        """An array as what its elements and scales stand for; the arguments are `quantize`'s."""
        return join_blocks(self.values(self.quantize(x, axes, noise)), axes, jax.typeof(x))


def split_blocks(x: jax.Array, axes: Sequence[int], size: int) -> jax.Array:
    """Makes two axes of each: which block, and the place in it.

    Args:
        x: array of any shape.
        axes: which axes, none negative.
        size: of a block.
    """
    for axis in sorted(axes, reverse=True):
        x = _split(x, axis, size)
    return x


def axes_in_blocks(axes: Sequence[int]) -> tuple[int, ...]:
    """The axes of a split array that are places in a block."""
    return tuple(axis + k + 1 for k, axis in enumerate(sorted(axes)))


def join_blocks(blocks: jax.Array, axes: Sequence[int], like: Any) -> jax.Array:
    """Undoes `split_blocks`.

    Args:
        blocks: array in blocks.
        axes: which axes were split.
        like: type of the array that was split: its shape, and on a mesh its sharding.
    """
    shape, sharding = list(blocks.shape), explicit_sharding(jax.typeof(blocks))
    spec = [None] * blocks.ndim if sharding is None else list(sharding.spec)
    for place in reversed(axes_in_blocks(axes)):
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
    blocks = -(-x.shape[axis] // size)
    missing = blocks * size - x.shape[axis]
    if not is_known(missing) or missing:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    shape = (*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
    return lax.reshape(x, shape, out_sharding=sharding)


class BlockCodes(NamedTuple):
    """A matrix in blocks, as the codes of its elements and scales.

    Attributes:
        elements: uint8 array, the codes of the elements; those of 4 bits two to a byte, along the
            last axis, where no mesh splits that.
        scales: uint8 array, the code of each block's scale.
        factor: what multiplies all of them, float without axes, or None.
        width: bits that the code of an element takes.
        aval: type of the matrix.
    """

    elements: jax.Array
    scales: jax.Array
    factor: jax.Array | None
    width: int
    aval: Any


def encode_blocks(x: jax.Array, form: BlockFormat, axes: tuple[int, ...] = (0,)) -> BlockCodes:
    """Quantizes a matrix.

    Args:
        x: array of shape (rows, n), float32 or float64.
        form: the format.
        axes: the axes along which the blocks lie.
    """
    aval = jax.typeof(x)
    width = jnp.finfo(form.element).bits if is_packable(aval.shape, aval.sharding) else 8
    elements, scales, factor = _encode(x, form, width, axes)
    return BlockCodes(elements, scales, factor, width, aval)


def decode_blocks(codes: BlockCodes, form: BlockFormat, axes: tuple[int, ...] = (0,)) -> jax.Array:
    """What the codes stand for.

    Args:
        codes: what `encode_blocks` returned.
        form: the format.
        axes: the axes along which the blocks lie.

    Returns:
        Array of shape (rows, n), in the dtype of what was encoded.
    """
    elements, scales, factor, width, aval = codes
    values = decode_elements(form.element, unpack_bits(elements, width, aval.shape[-1]), aval.dtype)
    blocks = split_blocks(values, axes, form.size)
    return join_blocks(form.values(ScaledBlocks(blocks, scales, factor)), axes, aval)


@functools.partial(jax.jit, static_argnames=("form", "width", "axes"))
def _encode(
    x: jax.Array, form: BlockFormat, width: int, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    elements, scales, factor = form.quantize(x, axes)
    codes = join_blocks(encode_elements(form.element, elements), axes, jax.typeof(x))
    return pack_bits(codes, width), scales, factor
