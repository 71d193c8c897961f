"""QuantEinsum: an einsum whose operands go through quantizers.

Written for 'nta,hab->nthb', as in `einsum`; an einsum is linear in each operand:

    forward   x_q     = q_x(x),  W_q = q_w(W)
              y       = sum_a x_q[n,t,a] W_q[h,a,b] + c[h,b]
    backward  dx_q    = sum_hb g[n,t,h,b] W_q[h,a,b],  dx = dq_x(dx_q)
              dW_q    = sum_nt x_q[n,t,a] g[n,t,h,b],  dW = dq_w(dW_q)
              dc[h,b] = sum_nt g[n,t,h,b]
    kept      the codes of W and x, or, with residuals="original", W and x, as in `QuantLinear`

It is composed, as that of `QuantLinear` is: of the backwards `dq_x` and `dq_w` of the quantizers
and that of `einsum`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import Dtype, EinsumT, Initializer, PrecisionLike, PromoteDtypeFn, Shape

from flax_customgrad.layers.linear.einsum import Einsum, einsum
from flax_customgrad.low_bit.quant_layers.quant_layer import (
    BiasQuantizer,
    GradientShaper,
    KeptOperands,
    QuantLayer,
)
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.numerics.products import MatmulConfig


class QuantEinsum(Einsum, QuantLayer):
    """`Einsum` with quantizers for its kernel, its input and the gradient of its output.

    Takes what `flax.nnx.Einsum` takes, but no operation of the user's own, and quantizers.

    Args:
        weight: a quantizer for the kernel, such as `FakeQuant(4, axis=-1)`; or None.
        activation: a quantizer for the input, such as `FakeQuant(4)`; or None.
        bias: a quantizer for the bias; "int32" for multiples of the product of the steps of input
            and kernel, as integer hardware adds them; or None.
        gradient: a layer that changes the gradient of the output and nothing else; or None.
        residuals: what is kept, and what the gradient is that of: "quantized" for the codes and the
            quantized einsum, "original" for the operands as they came and their einsum.

    Raises:
        TypeError: `weight`, `activation` or `bias` is no `Quantizer`, or `gradient` cannot be
            called.
        ValueError: `residuals` is neither "quantized" nor "original", an operation is injected, or
            `bias` is "int32" and kernel or input have no quantizer.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.QuantEinsum(
        ...     'nta,hab->nthb', (8, 2, 4), (8, 4), weight=fcg.FakeQuant(4, axis=(0, 2)),
        ...     rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 11, 2))).shape
        (16, 11, 8, 4)
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Shape,
        bias_shape: Shape | None = None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = nnx.initializers.zeros,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        einsum_op: EinsumT = jnp.einsum,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        weight: Quantizer | None = None,
        activation: Quantizer | None = None,
        bias: BiasQuantizer = None,
        gradient: GradientShaper | None = None,
        residuals: KeptOperands = "quantized",
    ):
        super().__init__(
            einsum_str,
            kernel_shape,
            bias_shape,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=promote_dtype,
            einsum_op=einsum_op,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self._set_quantizers(weight, activation, gradient, residuals, bias)

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: float array with an axis per label of the first operand.
            einsum_str: an equation that goes before that of the constructor, or None.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array with an axis per label behind the arrow.

        Raises:
            TypeError: the inputs are not floating.
            ValueError: there is no equation, it does not fit inputs and kernel, or it repeats a
                label within an operand or broadcasts an axis of size 1; or a bias that was replaced
                has another number of elements than the outputs of the kernel.
        """
        params, x = self._operands(inputs)
        equation = self._regular_equation(einsum_str, x, params)
        how = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return self._product(params, x, einsum, equation, how)
