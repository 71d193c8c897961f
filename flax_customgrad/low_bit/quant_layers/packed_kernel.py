"""`PackedKernel`: the quantized weights of a layer, in as few bytes as their codes take."""

import math
from abc import abstractmethod
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.low_bit.quantizers.codes import decode_packed, stored_width
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.numerics.packing import pack_bits


class Packed(nnx.Variable):
    """Codes of weights, or what decodes them, such as a scale; no optimizer moves them."""


@runtime_checkable
class Packable(Protocol):
    """A layer whose weights `pack` turns into codes."""

    def pack_weights(self) -> bool:
        """Puts codes in the place of the weights, in place; False where it quantizes none."""
        ...

    def unpack_weights(self) -> bool:
        """Puts a Param in the place of the codes again, in place; False where there are none."""
        ...


class PackedWeights(nnx.Module):
    """Takes the place of a layer's kernel; `kernel[...]` gives its values.

    Attributes:
        shape: of the kernel.
        dtype: of the kernel.
        bits: how many bits a code takes.
    """

    shape: tuple[int, ...]
    dtype: Any
    bits: int

    @property
    def saved_nbytes(self) -> int:
        """How many bytes it saves: those of its values, less those that it holds."""
        held = sum(a.nbytes for a in jax.tree.leaves(nnx.state(self, Packed)))
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize - held

    @abstractmethod
    def __getitem__(self, key: Any) -> jax.Array:
        """The values, indexed by a key."""


class PackedKernel(PackedWeights):
    """A quantized kernel as codes, in the place of a layer's kernel.

    The values, `kernel[...]`, are those of the quantizer to the bit.

    Attributes:
        codes: uint8, codes of at most 4 bits several to a byte along the last axis; uint16 for more
            than 8 bits.
        parameters: what decodes them, such as a scale.
        quantizer: what quantized the kernel, for `unpack`.
        shape: of the kernel.
        dtype: of the kernel.
        bits: how many bits a code takes.
    """

    def __init__(self, kernel: jax.Array, quantizer: Quantizer):
        """Quantizes and packs.

        Args:
            kernel: array of any shape, float.
            quantizer: the quantizer of the kernel.
        """
        values, codes, parameters, scheme = quantizer.quantize(kernel)
        self.bits = stored_width(scheme, codes)
        self.codes = Packed(pack_bits(codes, self.bits))
        self.parameters = nnx.List([Packed(p) for p in parameters])
        self.quantizer = quantizer
        self.shape = values.shape
        self.dtype = values.dtype
        self._scheme = scheme

    def __getitem__(self, key: Any) -> jax.Array:
        """The values, indexed by a key."""
        like = jax.ShapeDtypeStruct(self.shape, self.dtype)
        parameters = tuple(p[...] for p in self.parameters)
        return decode_packed(self.codes[...], parameters, self._scheme, self.bits, like)[key]
