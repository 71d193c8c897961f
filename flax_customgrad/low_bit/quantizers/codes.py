"""`Codes`: a quantized array between the passes, in as few bytes as its codes take.

The backward of a product reads its operands again, and quantized ones are decoded from codes of 1
to 16 bits: 4-bit ones take an eighth of float32. Codes have no derivative, so the values stay
beside them for second derivatives; the first backward reads the codes alone, and XLA drops values
that are not read. Outside of a trace nothing is dropped, and the values alone are kept.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.contract.residual_storage import keep_for_second_order, with_derivative_of
from flax_customgrad.low_bit.quantizers.scheme import Scheme
from flax_customgrad.numerics.dtypes import in_dtype, widened
from flax_customgrad.numerics.packing import (
    is_packable,
    pack_bits,
    packed_width,
    unpack_bits,
)


class Codes(NamedTuple):
    """An array and the codes of its elements.

    Attributes:
        values: the values that the codes encode, of any shape, float.
        codes: array of that shape, the integers minus the scheme's lowest: uint8 for at most 8
            bits, else uint16.
        parameters: the parameters of the scheme, such as a scale.
        scheme: the scheme that decodes the values; hashable, and no array.

    Example:
        Keys of attention that are stored as codes with a scale for each:

        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> found = fcg.FakeQuant(8, axis="token").quantize(jnp.array([[0.5, -1.0], [3.0, 0.0]]))
        >>> codes, (scales,) = found.codes, found.parameters
        >>> first = found._replace(codes=codes[:1], parameters=(scales[:1],)).decode()
        >>> bool((first == found.values[:1]).all())
        True
    """

    values: jax.Array
    codes: jax.Array
    parameters: tuple[jax.Array, ...]
    scheme: Scheme

    def decode(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values, from the codes and the parameters alone; without a gradient.

        Args:
            dtype: the dtype of the values.

        Returns:
            Array of the shape of `codes`, the values to the bit where they have that dtype.
        """
        like = jax.ShapeDtypeStruct(self.codes.shape, dtype)
        width = packed_width(max(self.scheme.bits, 8))
        return decode_packed(self.codes, self.parameters, self.scheme, width, like)

    def integers(self) -> jax.Array:
        """The integers of a scheme that is in int8, an int8 array of the shape of `codes`."""
        # Codes above 127 wrap around, and the sum comes back.
        return self.codes.astype(jnp.int8) + jnp.int8(self.scheme.low)


def to_codes(x: jax.Array, parameters: tuple[jax.Array, ...], scheme: Scheme) -> Codes:
    """Quantizes an array, with the gradient of the scheme.

    Args:
        x: array of any shape, float.
        parameters: the parameters of the scheme, such as a scale; float arrays that fit x.
        scheme: the scheme to quantize by.
    """
    values, codes = scheme(x, *parameters)
    return Codes(values, codes, parameters, scheme)


class PackedCodes(NamedTuple):
    """What is kept of `Codes`.

    Attributes:
        values: the values, for second derivatives; None while residuals are inspected.
        packed: the codes, several to a byte; None where the values alone are kept.
        parameters: the parameters of the scheme.
        scheme: the scheme that decodes the values.
        width: how many bits a code takes.
        like: shape and dtype of the values.
    """

    values: jax.Array | None
    packed: jax.Array | None
    parameters: tuple[jax.Array, ...]
    scheme: Scheme
    width: int
    like: Any


def pack_codes(codes: Codes) -> PackedCodes:
    """Packs codes for the backward.

    Args:
        codes: what a quantizer returned for an array.
    """
    values, q, parameters, scheme = codes
    like = jax.ShapeDtypeStruct(values.shape, values.dtype)
    bits = stored_width(scheme, q)
    if not is_traced(values):
        return PackedCodes(values, None, (), scheme, bits, like)
    return PackedCodes(
        keep_for_second_order(values), pack_bits(q, bits), parameters, scheme, bits, like
    )


def stored_width(scheme: Scheme, codes: jax.Array) -> int:
    """How many bits a code takes where several may be packed to a byte.

    Args:
        scheme: the scheme of the codes.
        codes: array of any shape, uint8 or uint16.
    """
    packable = is_packable(codes.shape, jax.typeof(codes).sharding)
    return packed_width(scheme.bits if packable else max(scheme.bits, 8))


def unpack_codes(codes: PackedCodes) -> jax.Array:
    """The values that `pack_codes` has packed.

    Args:
        codes: what `pack_codes` returned.
    """
    values, packed, parameters, scheme, bits, like = codes
    if packed is None:
        assert values is not None
        return values
    decoded = decode_packed(packed, parameters, scheme, bits, like)
    return decoded if values is None else with_derivative_of(decoded, values)


def decode_packed(
    packed: jax.Array, parameters: tuple[jax.Array, ...], scheme: Scheme, bits: int, like: Any
) -> jax.Array:
    """The values that packed codes encode.

    Args:
        packed: uint8 array, packed along the last axis; uint16; or int8, the integers themselves.
        parameters: the parameters of the scheme.
        scheme: the scheme that decodes the values.
        bits: how many bits a code takes.
        like: shape and dtype of the values.
    """
    operands = unpacked_integers(packed, parameters, scheme, bits, like)
    return in_dtype(scheme.decode(*operands), like.dtype)


def unpacked_integers(
    packed: jax.Array, parameters: tuple[jax.Array, ...], scheme: Scheme, bits: int, like: Any
) -> list[jax.Array]:
    """The integers of packed codes and the parameters, as floats of float32 or wider.

    Args:
        packed: uint8 array, packed along the last axis; uint16; or int8, the integers themselves.
        parameters: the parameters of the scheme.
        scheme: the scheme of the codes.
        bits: how many bits a code takes.
        like: shape and dtype of the values.
    """
    q = packed if bits >= 8 else unpack_bits(packed, bits, like.shape[-1])
    wide = jnp.result_type(jnp.float32, like.dtype)
    low = 0 if q.dtype == jnp.int8 else scheme.low
    return list(widened(like.dtype, q.astype(wide) + low, *parameters))
