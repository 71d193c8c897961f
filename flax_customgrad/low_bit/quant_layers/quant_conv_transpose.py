"""QuantConvTranspose: a transposed convolution whose operands go through quantizers.

Forward, backward and what is kept are those of `QuantConv`, with the geometry of `ConvTranspose`.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import Array, Dtype, Initializer, PaddingLike, PrecisionLike, PromoteDtypeFn

from flax_customgrad.layers.conv.conv_arguments import check_conv_inputs
from flax_customgrad.layers.conv.conv_transpose import ConvTranspose
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.quant_layers.quant_conv import masked_convolution, masked_parameters
from flax_customgrad.low_bit.quant_layers.quant_layer import (
    BiasQuantizer,
    GradientShaper,
    KeptOperands,
    QuantLayer,
)
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer


class QuantConvTranspose(ConvTranspose, QuantLayer):
    """`ConvTranspose` with quantizers for its kernel, its input and the gradient of its output.

    Takes what `flax.nnx.ConvTranspose` takes, and quantizers. With `transpose_kernel` the output
    channels are the kernel's axis -2.

    Args:
        weight: a quantizer for the kernel, such as `FakeQuant(4, axis=-1)`; or None.
        activation: a quantizer for the input, such as `FakeQuant(4)`; or None.
        bias: a quantizer for the bias; "int32" for multiples of the product of the steps of input
            and kernel, as integer hardware adds them; or None.
        gradient: a layer that changes the gradient of the output and nothing else; or None.
        residuals: what is kept, and what the gradient is that of: "quantized" for the codes and the
            quantized convolution, "original" for the operands as they came and their convolution.

    Raises:
        TypeError: `weight`, `activation` or `bias` is no `Quantizer`, or `gradient` cannot be
            called.
        ValueError: `residuals` is neither "quantized" nor "original", an operation is injected, or
            `bias` is "int32" and kernel or input have no quantizer.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.QuantConvTranspose(
        ...     4, 8, (4, 4), strides=2, weight=fcg.FakeQuant(4, axis=-1), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 16, 16, 4))).shape
        (2, 32, 32, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = None,
        *,
        padding: PaddingLike = "SAME",
        kernel_dilation: int | Sequence[int] | None = None,
        use_bias: bool = True,
        mask: Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike | None = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = nnx.initializers.zeros,
        transpose_kernel: bool = False,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
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
            kernel_size,
            strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            use_bias=use_bias,
            mask=mask,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            transpose_kernel=transpose_kernel,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self._set_quantizers(weight, activation, gradient, residuals, bias)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: float array of shape (*batch, *size, in_features), with any number of batch
                axes.

        Returns:
            Array of shape (*batch, *out, out_features), in `dtype` or the promoted dtype.

        Raises:
            TypeError: the inputs are not floating.
            ValueError: `ConvTranspose` would raise it.
        """
        params, x = self._operands(inputs)
        check_conv_inputs(self, x, self.in_features)
        return self._product(params, x, masked_convolution, self._config(x))

    def _parameters(self) -> Parameters:
        return masked_parameters(self)
