"""QuantLinear: a linear layer whose kernel, input and gradient go through quantizers.

    forward   x_q  = q_x(x),  W_q = q_w(W)
              y    = x_q W_q + b
    backward  dx_q = g W_q^T,    dx = dq_x(dx_q)
              dW_q = x_q^T g,    dW = dq_w(dW_q)
              db   = sum(g)
    kept      the codes of W and x, or, with residuals="original", W and x, which then stand in
              for W_q and x_q in dx_q and dW_q

It is composed: `dq_x` and `dq_w` are the backwards of the quantizers, on pages of their own; y is a
`quantized_product`, whose backward is that of `linear`, at what is kept, with sums in float32. The
product is one of int8 where `integer_product` says that it gains.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import DotGeneralT, Dtype, Initializer, PrecisionLike, PromoteDtypeFn
from jax import lax

from flax_customgrad.layers.linear.linear import Linear, linear
from flax_customgrad.low_bit.int8.int8_matmul import MatmulOp
from flax_customgrad.low_bit.quant_layers.quant_layer import (
    BiasQuantizer,
    GradientShaper,
    KeptOperands,
    QuantizerChoice,
    QuantLayer,
)
from flax_customgrad.numerics.products import MatmulConfig


class QuantLinear(Linear, QuantLayer):
    """`Linear` with quantizers for its kernel, its input and the gradient of its output.

    Parameters, their names and initial values are those of `flax.nnx.Linear`; the kernel that is
    trained is not quantized, and goes through its quantizer in each call.

    Takes what `flax.nnx.Linear` takes, but no operation of the user's own, and quantizers.

    Where kernel and input have at most 8 bits, no zero point, and one scale, or one for each output
    and each token, their integers are multiplied in int8 and summed exactly, in training and in
    packed models alike: on a CPU, for kernels of at least 2^15 weights, with jax 0.12 for any input
    and before it for at most 8 rows. An input that is not finite makes its row NaN. In all other
    cases, float64 and other platforms included, the quantized values are multiplied as floats.

    Args:
        weight: a quantizer for the kernel, such as `FakeQuant(4, axis=-1)`; None, as by
            default, for none.
        activation: a quantizer for the input, such as `FakeQuant(4)`; None, as by default,
            for none.
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
        >>> four_bits = dict(weight=fcg.FakeQuant(4, axis=-1), activation=fcg.FakeQuant(4))
        >>> layer = fcg.QuantLinear(16, 3, **four_bits, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((8, 16))
        >>> layer(x).shape
        (8, 3)
        >>> fcg.residual_bytes(layer, x), x.nbytes
        (124, 512)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = nnx.initializers.zeros,
        dot_general: DotGeneralT = lax.dot_general,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        weight: QuantizerChoice = "default",
        activation: QuantizerChoice = "default",
        bias: BiasQuantizer = None,
        gradient: GradientShaper | None = None,
        residuals: KeptOperands = "quantized",
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dot_general=dot_general,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self._set_quantizers(weight, activation, gradient, residuals, bias)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features), float.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.

        Raises:
            TypeError: the inputs are not floating.
        """
        params, x = self._operands(inputs)
        how = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return self._product(params, x, linear, how, of_codes=MatmulOp(how))
