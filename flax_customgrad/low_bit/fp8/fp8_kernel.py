"""`Fp8Kernel`: the weights of an fp8 layer in E4M3, as the layer multiplies them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.layers.packed_weights import Packed, PackedWeights
from flax_customgrad.low_bit.fp8.fp8_codes import FORWARD_DTYPE, Fp8Codes, current_scale, encode_fp8
from flax_customgrad.low_bit.quant_layers.latent_weights import Measured, latent_weights
from flax_customgrad.numerics.accumulation import accumulator


class Fp8Kernel(PackedWeights):
    """The codes of a kernel in E4M3 and their scale, in the place of the kernel.

    With delayed scaling the scales of the step in which the layer was packed are kept, that of the
    input included: a packed layer remembers nothing.

    Args:
        kernel: array of any shape, float, in the dtype of the computation.
        dtype: the dtype of the kernel.
        variable: the Variable of the kernel, whose type and metadata are kept.
        scales: those of the input, of the kernel and of the gradient, float32 of shape (3,); None
            for current scaling.
        margin: how many halvings of the range are left unused.

    Attributes:
        codes: the bits of the codes, uint8, of the shape of the kernel.
        scales: that of the kernel, of shape (1,); or the three of delayed scaling.
        kind: the type of the kernel's Variable.
        shape: of the kernel.
        dtype: of the kernel.
        bits: 8.
    """

    def __init__(
        self,
        kernel: jax.Array,
        dtype: Any,
        variable: nnx.Variable,
        scales: jax.Array | None,
        margin: int,
    ):
        self._computed, self._margin = kernel.dtype, margin
        self.shape, self.dtype, self.bits = kernel.shape, dtype, 8
        self.kind = type(variable)
        made = self._encode(kernel, scales)
        self.codes = Packed.from_metadata(made.codes, variable.get_metadata())
        self.scales = Packed(made.scales)

    @property
    def fp8(self) -> Fp8Codes:
        """The codes and scales."""
        return Fp8Codes(self.codes[...], self.scales[...])

    def __getitem__(self, key: Any) -> jax.Array:
        """The values, indexed by a key."""
        codes, wide = self.fp8, accumulator(self.dtype)
        values = lax.bitcast_convert_type(codes.codes, FORWARD_DTYPE).astype(wide)
        values *= codes.kernel_scale.astype(wide)
        largest = jnp.finfo(self.dtype).max
        return jnp.clip(values, -largest, largest).astype(self.dtype)[key]

    def latent(self) -> jax.Array:
        """Weights that have these codes and scales."""
        w, packed = self[...], self.fp8
        # The scales of delayed scaling do not depend on the weights.
        if is_traced(w) or packed.has_all_scales:
            return w

        def measure(w: jax.Array) -> Measured:
            made = self._encode(w.astype(self._computed), None)
            return Measured(made.codes, (made.scales,))

        return latent_weights(w, Measured(packed.codes, (packed.scales,)), measure)

    def _encode(self, kernel: jax.Array, scales: jax.Array | None) -> Fp8Codes:
        if scales is None:
            scales = current_scale(kernel, self._margin)[None]
        scale = Fp8Codes(kernel, scales).kernel_scale
        codes = lax.bitcast_convert_type(encode_fp8(kernel, scale, FORWARD_DTYPE), jnp.uint8)
        return Fp8Codes(codes, scales)
