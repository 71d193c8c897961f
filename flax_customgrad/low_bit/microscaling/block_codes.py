"""`Codes`: a matrix between the passes, as the codes of its elements and scales."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_customgrad.low_bit.microscaling.scaled_blocks import Format, Scaled, join, split
from flax_customgrad.low_bit.microscaling.small_floats import decode, encode
from flax_customgrad.numerics.packing import pack, packs, unpack


class Codes(NamedTuple):
    """A matrix in blocks along its rows.

    Attributes:
        elements: uint8 array, the codes of the elements; those of 4 bits two to a byte, along the
            last axis, where no mesh splits that.
        scales: uint8 array, the code of each block's scale.
        factor: what multiplies all of them, float without axes, or None.
        width: bits that the code of an element takes.
        of: type of the matrix.
    """

    elements: jax.Array
    scales: jax.Array
    factor: jax.Array | None
    width: int
    of: Any


def coded(x: jax.Array, by: Format) -> Codes:
    """Quantizes a matrix along its rows.

    Args:
        x: array of shape (rows, n), float32 or float64.
        by: the format.
    """
    of = jax.typeof(x)
    width = jnp.finfo(by.element).bits if packs(of.shape, of.sharding) else 8
    elements, scales, factor = _coded(x, by, width)
    return Codes(elements, scales, factor, width, of)


def decoded(codes: Codes, by: Format) -> jax.Array:
    """What the codes stand for.

    Args:
        codes: what `coded` returned.
        by: the format.
    """
    elements, scales, factor, width, of = codes
    values = decode(by.element, unpack(elements, width, of.shape[-1]), of.dtype)
    blocks = split(values, (0,), by.size)
    return join(by.values(Scaled(blocks, scales, factor)), (0,), of)


@functools.partial(jax.jit, static_argnames=("by", "width"))
def _coded(x: jax.Array, by: Format, width: int) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    elements, scales, factor = by.quantize(x, (0,))
    codes = join(encode(by.element, elements), (0,), jax.typeof(x))
    return pack(codes, width), scales, factor
