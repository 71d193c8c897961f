"""`PackedKernel`: the quantized weights of a layer, in as few bytes as their codes take."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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
        codes: uint8, codes of at most 4 bits several to a byte along the last axis; for more bits
            int8, the integers as they are multiplied, where it holds them; else uint8 or uint16.
        parameters: what decodes them, such as a scale.
        scheme: the scheme of the codes.
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
        found = quantizer.quantize(kernel)
        values, codes, parameters, scheme = found
        self.bits = stored_width(scheme, codes)
        in_int8 = self.bits == 8 and scheme.is_int8
        stored = found.integers() if in_int8 else pack_bits(codes, self.bits)
        self.codes = Packed.from_metadata(stored, variable.get_metadata())
        self.kind = type(variable)
        self.parameters = nnx.List([Packed(p) for p in parameters])
        self.quantizer = quantizer
        self.shape = values.shape
        self.dtype = values.dtype
        self.scheme = scheme

    def __getitem__(self, key: Any) -> jax.Array:
        """The values, indexed by a key."""
        like = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return decode_packed(self.codes[...], self.scheme_parameters, self.scheme, self.bits, like)[
            key
        ]

    @property
    def decoded(self) -> Codes:
        """The values, and the codes and parameters that they come from."""
        codes = self.codes[...]
        if codes.dtype == jnp.int8:
            codes = (codes - jnp.int8(self.scheme.low)).astype(jnp.uint8)
        codes = codes if self.bits >= 8 else unpack_bits(codes, self.bits, self.shape[-1])
        return Codes(self[...], codes, self.scheme_parameters, self.scheme)

    @property
    def scheme_parameters(self) -> tuple[jax.Array, ...]:
        """What decodes the codes, as arrays."""
        return tuple(p[...] for p in self.parameters)

    def latent(self) -> jax.Array:
        """Weights that the quantizer turns into these codes again."""
        like = jax.ShapeDtypeStruct(self.shape, self.dtype)
        parameters = self.scheme_parameters
        operands = unpacked_integers(self.codes[...], parameters, self.scheme, self.bits, like)
        w = in_dtype(self.scheme.latent(*operands), self.dtype)
        if is_traced(w):
            return w

        def measure(w: jax.Array) -> Measured:
            made = self.quantizer.quantize(w)
            return Measured(made.codes, made.parameters)

        granularity = getattr(self.scheme, "granularity", None)
        blocks = (
            {} if granularity is None else {"spread": partial(granularity.spread, shape=self.shape)}
        )
        return latent_weights(w, Measured(self.decoded.codes, parameters), measure, **blocks)
