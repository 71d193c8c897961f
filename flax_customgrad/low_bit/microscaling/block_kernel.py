"""`BlockKernel`: the weights of a layer as elements of 4 or 8 bits that share scales in blocks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.layers.packed_weights import Packed, PackedWeights
from flax_customgrad.low_bit.microscaling.scaled_blocks import (
    BlockCodes,
    BlockFormat,
    decode_blocks,
    encode_blocks,
)
from flax_customgrad.low_bit.quant_layers.latent_weights import Measured, latent_weights
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.dtypes import in_dtype
from flax_customgrad.numerics.packing import unpack_bits


class BlockKernel(PackedWeights):
    """The codes of a kernel in blocks, in the place of the kernel; `kernel[...]` gives its values.

    The values are those that a layer multiplies, to the bit. They are computed in float32, or in
    float64 for a kernel of float64.

    Args:
        kernel: array of shape (in_features, out_features), float.
        variable: the Variable of the kernel, whose type and metadata are kept.
        form: the format.
        axes: the axes along which the blocks lie.

    Attributes:
        codes: uint8, the codes of the elements; those of 4 bits two to a byte.
        scales: uint8, the code of each block's scale.
        factor: what multiplies all of them, float without axes; None for 1.
        kind: the type of the kernel's Variable.
        shape: of the kernel.
        dtype: of the kernel.
        bits: how many bits a code takes.
    """

    def __init__(
        self, kernel: jax.Array, variable: nnx.Variable, form: BlockFormat, axes: tuple[int, ...]
    ):
        self.dtype = kernel.dtype
        self.shape = kernel.shape
        self._form, self._axes = form, axes
        codes = self._encode(kernel)
        self.codes = Packed.from_metadata(codes.elements, variable.get_metadata())
        self.kind = type(variable)
        self.scales = Packed(codes.scales)
        self.factor = nnx.data(None if codes.factor is None else Packed(codes.factor))
        self.bits = codes.width

    def __getitem__(self, key: Any) -> jax.Array:
        """The values, indexed by a key."""
        factor = None if self.factor is None else self.factor[...]
        aval = jax.ShapeDtypeStruct(self.shape, accumulator(self.dtype))
        codes = BlockCodes(self.codes[...], self.scales[...], factor, self.bits, aval)
        return decode_blocks(codes, self._form, self._axes)[key]

    def latent(self) -> jax.Array:
        """Weights that have these codes and scales."""
        w = in_dtype(self[...], self.dtype)
        if is_traced(w):
            return w

        def unpacked(elements: jax.Array) -> jax.Array:
            return unpack_bits(elements, self.bits, self.shape[-1])

        def measure(w: jax.Array) -> Measured:
            made = self._encode(w)
            factor = () if made.factor is None else (made.factor,)
            return Measured(unpacked(made.elements), (*factor, made.scales))

        def spread(numbers: jax.Array) -> jax.Array:
            for axis in self._axes if numbers.ndim else ():
                numbers = jnp.repeat(lax.squeeze(numbers, (axis + 1,)), self._form.size, axis)
            return numbers[tuple(map(slice, self.shape))] if numbers.ndim else numbers

        factor = () if self.factor is None else (self.factor[...],)
        wanted = Measured(unpacked(self.codes[...]), (*factor, self.scales[...]))
        return latent_weights(w, wanted, measure, spread)

    def _encode(self, kernel: jax.Array) -> BlockCodes:
        return encode_blocks(kernel.astype(accumulator(kernel)), self._form, self._axes)
