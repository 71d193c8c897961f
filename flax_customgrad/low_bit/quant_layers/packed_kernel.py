"""`PackedKernel`: the quantized weights of a layer, in as few bytes as their codes take."""

from functools import partial
from typing import Any

import jax
from flax import nnx

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.layers.packed_weights import Packed, PackedWeights
from flax_customgrad.low_bit.quant_layers.latent_weights import Measured, latent_weights
from flax_customgrad.low_bit.quantizers.codes import (
    Codes,
    decode_packed,
    stored_width,
    unpacked_integers,
)
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.numerics.dtypes import in_dtype
from flax_customgrad.numerics.packing import pack_bits, unpack_bits


class PackedKernel(PackedWeights):
    """A quantized kernel as codes, in the place of a layer's kernel.

    The values, `kernel[...]`, are those of the quantizer to the bit.

    Attributes:
        codes: uint8, codes of at most 4 bits several to a byte along the last axis; uint16 for more
            than 8 bits.
        parameters: what decodes them, such as a scale.
        quantizer: what quantized the kernel, for `unpack`.
        kind: the type of its Variable.
        shape: of the kernel.
        dtype: of the kernel.
        bits: how many bits a code takes.
    """

    def __init__(self, kernel: jax.Array, quantizer: Quantizer, variable: nnx.Variable):
        """Quantizes and packs.

        Args:
            kernel: array of any shape, float.
            quantizer: the quantizer of the kernel.
            variable: the Variable of the kernel, whose type and metadata are kept.
        """
        values, codes, parameters, scheme = quantizer.quantize(kernel)
        self.bits = stored_width(scheme, codes)
        self.codes = Packed.from_metadata(pack_bits(codes, self.bits), variable.get_metadata())
        self.kind = type(variable)
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

    @property
    def decoded(self) -> Codes:
        """The values, and the codes and parameters that they come from."""
        codes = self.codes[...]
        codes = codes if self.bits >= 8 else unpack_bits(codes, self.bits, self.shape[-1])
        return Codes(self[...], codes, tuple(p[...] for p in self.parameters), self._scheme)

    def latent(self) -> jax.Array:
        """Weights that the quantizer turns into these codes again."""
        like = jax.ShapeDtypeStruct(self.shape, self.dtype)
        parameters = tuple(p[...] for p in self.parameters)
        operands = unpacked_integers(self.codes[...], parameters, self._scheme, self.bits, like)
        w = in_dtype(self._scheme.latent(*operands), self.dtype)
        if is_traced(w):
            return w

        def measure(w: jax.Array) -> Measured:
            made = self.quantizer.quantize(w)
            return Measured(made.codes, made.parameters)

        codes = self.codes[...]
        unpacked = codes if self.bits >= 8 else unpack_bits(codes, self.bits, self.shape[-1])
        granularity = getattr(self._scheme, "granularity", None)
        blocks = (
            {} if granularity is None else {"spread": partial(granularity.spread, shape=self.shape)}
        )
        return latent_weights(w, Measured(unpacked, parameters), measure, **blocks)
