"""Codes of a few bits, several to a byte.

    pack    byte[..., j] = sum_k code[..., j n + k] 2^(bits k),  n = 8 / bits codes to a byte
    unpack  code[..., j n + k] = byte[..., j] 2^-(bits k)  modulo 2^bits

The first code is in the lowest bits. The last byte of an axis is filled up with zeros. For one bit
the result is that of `jnp.packbits(bitorder="little")`, which adds up 8 integers of 32 bits, where
this takes 7 bitwise ors of bytes.
"""

from typing import Any

import jax
import jax.numpy as jnp


def packed_width(bits: int) -> int:
    """How many bits a packed code takes: the next of 1, 2, 4, 8 and 16.

    Args:
        bits: how many bits a code has, from 1 to 16.

    Raises:
        ValueError: `bits` is not from 1 to 16.
    """
    for width in (1, 2, 4, 8, 16):
        if 1 <= bits <= width:
            return width
    raise ValueError(f"a code has 1 to 16 bits, got bits={bits!r}")


def pack_bits(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes of a few bits into bytes, along the last axis.

    Args:
        codes: integers in [0, 2^bits), of shape (..., n).
        bits: 1, 2, 4, 8 or 16.

    Returns:
        uint8 array of shape (..., ceil(n bits / 8)); for 16 bits uint16 of shape (..., n).
    """
    if bits >= 8:
        return codes.astype(jnp.uint8 if bits == 8 else jnp.uint16)
    per_byte = 8 // bits
    codes = codes.astype(jnp.uint8)
    n = codes.shape[-1]
    if n % per_byte:
        codes = jnp.pad(codes, [*[(0, 0)] * (codes.ndim - 1), (0, -n % per_byte)])
    places = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    packed = places[..., 0]
    for k in range(1, per_byte):
        packed |= places[..., k] << (bits * k)
    return packed


def unpack_bits(packed: jax.Array, bits: int, n: int) -> jax.Array:
    """The codes that `pack_bits` has packed.

    Args:
        packed: what `pack_bits` returned.
        bits: 1, 2, 4, 8 or 16.
        n: how many codes the last axis has.

    Returns:
        uint8 array of shape (..., n); uint16 for 16 bits.
    """
    if bits >= 8:
        return packed
    per_byte = 8 // bits
    shifts = jnp.arange(per_byte, dtype=jnp.uint8) * jnp.uint8(bits)
    codes = (packed[..., None] >> shifts) & jnp.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)[..., :n]


def unpack_places(packed: jax.Array, bits: int) -> list[jax.Array]:
    """The codes in each place of the bytes, from the lowest bits on: a part of them an array.

    Args:
        packed: uint8 array, of `pack_bits`.
        bits: 1, 2 or 4.

    Returns:
        uint8 arrays of the shape of `packed`: of the k-th, column j is code `j 8 / bits + k`.
    """
    return [(packed >> shift) & jnp.uint8(2**bits - 1) for shift in range(0, 8, bits)]


def is_packable(shape: tuple[int, ...], sharding: Any = None) -> bool:
    """Whether the last axis can be packed: there is one, and no mesh splits it.

    Args:
        shape: the shape of the codes.
        sharding: their sharding, as `jax.typeof` has it, or None.
    """
    spec: tuple[Any, ...] = tuple(getattr(sharding, "spec", ()))
    return bool(shape) and not (len(spec) == len(shape) and spec[-1] is not None)


def pack_mask(mask: jax.Array) -> jax.Array:
    """Packs a mask into one bit per element, where the last axis can be packed.

    The last axis is cut into eight blocks, and a byte holds one element of each. Both directions
    then run along whole blocks, several times as fast on a CPU as eight neighbors in a byte.

    Args:
        mask: array of bool, of any shape.

    Returns:
        uint8 array of shape (..., ceil(n / 8)); or the mask, where its last axis cannot be packed.
    """
    if not is_packable(mask.shape, jax.typeof(mask).sharding):
        return mask
    width = -(-mask.shape[-1] // 8)
    padding = [*[(0, 0)] * (mask.ndim - 1), (0, 8 * width - mask.shape[-1])]
    bits = jnp.pad(mask, padding).astype(jnp.uint8)
    packed = bits[..., :width]
    for k in range(1, 8):
        packed |= bits[..., k * width : (k + 1) * width] << k
    return packed


def unpack_mask(packed: jax.Array, n: int) -> jax.Array:
    """The mask that `pack_mask` has packed.

    Args:
        packed: what `pack_mask` returned.
        n: how many elements the last axis of the mask has.

    Returns:
        Array of bool, of shape (..., n).
    """
    if packed.dtype == jnp.bool:
        return packed
    bits = jnp.concatenate([(packed >> k) & jnp.uint8(1) for k in range(8)], axis=-1)
    return bits[..., :n].astype(jnp.bool)


def masked(g: jax.Array, mask: jax.Array) -> jax.Array:
    """An array where a mask is true, and 0 elsewhere.

    Args:
        g: array of any shape.
        mask: what `pack_mask` returned for a mask of that shape.

    Returns:
        Array like g.
    """
    return jnp.where(unpack_mask(mask, g.shape[-1] if g.ndim else 1), g, 0)
