"""`Int8Kernel`: the weights of an int8 layer in int8, as the layer multiplies them."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.layers.packed_weights import Packed, PackedWeights
from flax_customgrad.low_bit.int8.int8_codes import Int8Array
from flax_customgrad.low_bit.quant_layers.latent_weights import Measured, latent_weights


class Int8Kernel(PackedWeights):
    """The int8 codes and the scales of a kernel, in the place of the kernel.

    A layer multiplies them as they are. They are computed in the dtype of the layer, or else in
    that of the kernel, so the scales of float32 weights are float32 for a float64 input too.

    Args:
        kernel: the codes and scales of the kernel.
        dtype: the dtype of the kernel.
        variable: the Variable of the kernel, whose type and metadata are kept.
        encode: encodes a kernel as this one was; hashable.

    Attributes:
        codes: int8, of the shape of the kernel.
        scale: what a code is a multiple of, float32 or wider.
        kind: the type of the kernel's Variable.
        shape: of the kernel.
        dtype: of the kernel.
        bits: 8.
    """

    def __init__(
        self,
        kernel: Int8Array,
        dtype: Any,
        variable: nnx.Variable,
        encode: Callable[[jax.Array], Int8Array],
    ):
        self.codes = Packed.from_metadata(kernel.codes, variable.get_metadata())
        self.kind = type(variable)
        self.scale = Packed(kernel.scale)
        self.shape = kernel.codes.shape
        self.dtype = dtype
        self.bits = 8
        self._encode = encode

    @property
    def int8(self) -> Int8Array:
        """The codes and scales, which have no derivative."""
        return Int8Array(self.codes[...], self.scale[...], None)

    def __getitem__(self, key: Any) -> jax.Array:
        """The values, of which a key takes a part."""
        return self.int8.values(self.dtype)[key]

    def latent(self) -> jax.Array:
        """Weights that have these codes and scales."""
        if is_traced(w := self[...]):
            return w

        def measure(w: jax.Array) -> Measured:
            made = self._encode(w)
            return Measured(made.codes, (made.scale,))

        return latent_weights(w, Measured(self.codes[...], (self.scale[...],)), measure)
