"""QuantLinearGeneral: a product over several axes, whose operands go through quantizers.

With B the batch axes, I the contracted axes of x and O the new axes of y:

    forward   x_q      = q_x(x),  W_q = q_w(W)
              y        = sum_I x_q[B, ..., I] W_q[B, I, O] + b[B, O]
    backward  dx_q     = sum_O g[B, ..., O] W_q[B, I, O],      dx = dq_x(dx_q)
              dW_q     = sum_... x_q[B, ..., I] g[B, ..., O],  dW = dq_w(dW_q)
              db[B, O] = sum_... g[B, ..., O]
    kept      the codes of W and x, or, with residuals="original", W and x, as in `QuantLinear`

It is composed, as that of `QuantLinear` is: of the backwards `dq_x` and `dq_w` of the quantizers
and that of `linear_general`.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import DotGeneralT, Dtype, Initializer, PrecisionLike, PromoteDtypeFn

from flax_customgrad.layers.linear.linear_general import LinearGeneral, linear_general
from flax_customgrad.low_bit.quant_layers.quant_layer import (
    BiasQuantizer,
    GradientShaper,
    KeptOperands,
    QuantLayer,
)
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.numerics.products import MatmulConfig


class QuantLinearGeneral(LinearGeneral, QuantLayer):
    """`LinearGeneral` with quantizers for its kernel, its input and the gradient of its output.

    Takes what `flax.nnx.LinearGeneral` takes, but no operation of the user's own, and quantizers. A
    quantizer's axes are those of the kernel, (*batch,
    *in_features, *out_features), and of the input as it comes.

    Args:
        weight: a quantizer for the kernel, such as `FakeQuant(4, axis=(-2, -1))`; or None.
        activation: a quantizer for the input, such as `FakeQuant(4)`; or None.
        bias: a quantizer for the bias; "int32" for multiples of the product of the steps of input
            and kernel, as integer hardware adds them; or None.
        gradient: a layer that changes the gradient of the output and nothing else; or None.
        residuals: what is kept, and what the gradient is that of: "quantized" for the codes and the
            quantized product, "original" for the operands as they came and their product.

    Raises:
        TypeError: `weight`, `activation` or `bias` is no `Quantizer`, or `gradient` cannot be
            called.
        ValueError: `residuals` is neither "quantized" nor "original", an operation is injected, or
            `bias` is "int32" and kernel or input have no quantizer.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.QuantLinearGeneral(
        ...     (2, 3), (4, 5), axis=(1, -1), weight=fcg.FakeQuant(4, axis=(-2, -1)),
        ...     rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 2, 3))).shape
        (16, 4, 5)
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        batch_axis: Mapping[int, int] = FrozenDict({}),
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = nnx.initializers.zeros,
        precision: PrecisionLike = None,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        dot_general: DotGeneralT | None = None,
        dot_general_cls: Any = None,
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
            in_features,
            out_features,
            axis=axis,
            batch_axis=batch_axis,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            precision=precision,
            promote_dtype=promote_dtype,
            dot_general=dot_general,
            dot_general_cls=dot_general_cls,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self._set_quantizers(weight, activation, gradient, residuals, bias)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: float array whose axes `axis` have the sizes `in_features`, and whose axes in
                `batch_axis` have the sizes given there.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (*batch, *other axes of inputs, *out_features).

        Raises:
            TypeError: the inputs are not floating.
        """
        params, x = self._operands(inputs)
        how = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return self._product(params, x, linear_general, self._axes(x), how)
