"""Codes of a few bits, several to a byte.

    pack    byte[..., j] = sum_k code[..., j n + k] 2^(bits k),  n = 8 / bits codes to a byte
    unpack  code[..., j n + k] = byte[..., j] 2^-(bits k)  modulo 2^bits

The first code is in the lowest bits. The last byte of an axis is filled up with zeros. Of one bit
it is `jnp.packbits(bitorder="little")`, which adds up 8 integers of 32 bits where this is 7 ors of
bytes, element by element.
"""

from typing import Any

import jax
import jax.numpy as jnp


def packed_width(bits: int) -> int:
    """How many bits a code takes: the next of 1, 2, 4 and 8.

    Args:
        bits: from 1 to 8.

    Raises:
        ValueError: bits out of range.
    """
    for width in (1, 2, 4, 8):
        if 1 <= bits <= width:
            return width
    raise ValueError(f"a code has 1 to 8 bits, got bits={bits!r}")


def pack_bits(codes: jax.Array, bits: int) -> jax.Array:
    """Puts codes of a few bits side by side, along the last axis.

    Args:
        codes: integers in [0, 2^bits), of shape (..., n).
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 array of shape (..., ceil(n bits / 8)).
    """
    per_byte = 8 // bits
    codes = codes.astype(jnp.uint8)
    if per_byte == 1:
        return codes
    n = codes.shape[-1]
    if n % per_byte:
        codes = jnp.pad(codes, [*[(0, 0)] * (codes.ndim - 1), (0, -n % per_byte)])
    places = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    packed = places[..., 0]
    for k in range(1, per_byte):
        packed |= places[..., k] << (bits * k)
    return packed


def unpack_bits(packed: jax.Array, bits: int, n: int) -> jax.Array:
    """The codes again.

    Args:
        packed: uint8 array of shape (..., ceil(n bits / 8)).
        bits: 1, 2, 4 or 8.
        n: how many codes the last axis has.

    Returns:
        uint8 array of shape (..., n).
    """
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    shifts = jnp.arange(per_byte, dtype=jnp.uint8) * jnp.uint8(bits)
    codes = (packed[..., None] >> shifts) & jnp.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)[..., :n]


def is_packable(shape: tuple[int, ...], sharding: Any = None) -> bool:
    """Whether the last axis can be packed: there is one, and no mesh splits it.

    Args:
        shape: of the codes.
        sharding: their sharding, as `jax.typeof` has it, or None.
    """
    spec: tuple[Any, ...] = tuple(getattr(sharding, "spec", ()))
    return bool(shape) and not (len(spec) == len(shape) and spec[-1] is not None)


def pack_mask(mask: jax.Array) -> jax.Array:
    """Keeps a mask in a bit an element, or a byte where the last axis cannot be packed.

    Args:
        mask: booleans of any shape.
    """
    return pack_bits(mask, 1) if is_packable(mask.shape, jax.typeof(mask).sharding) else mask


def masked(g: jax.Array, mask: jax.Array) -> jax.Array:
    """An array where a mask that `pack_mask` kept is true, and 0 elsewhere.

    Args:
        g: array of any shape.
        mask: what was kept for a mask of that shape.
    """
    if mask.dtype != jnp.bool:
        mask = unpack_bits(mask, 1, g.shape[-1]).astype(jnp.bool)
    return jnp.where(mask, g, 0)
