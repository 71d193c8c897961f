"""QuantConv: a convolution whose kernel, input and gradient go through quantizers.

    forward   x_q  = q_x(x),  W_q = q_w(W)
              y    = conv(x_q, W_q) + b
    backward  dx_q = the gradient of conv for its images, at W_q,  dx = dq_x(dx_q)
              dW_q = the gradient of conv for its kernel, at x_q,  dW = dq_w(dW_q)
              db   = the sum of g over images and space
    kept      the codes of W and x, or, with residuals="original", W and x, as in `QuantLinear`

It is composed, as that of `QuantLinear` is: of the backwards `dq_x` and `dq_w` of the quantizers
and that of `convolution`, which writes conv out. Quantizers see images with the batch axes that
they came with, and the kernel times its mask. What a mask takes out stays out: a binary code is
never 0. The convolution is one of int8 where `integer_product` says that it gains.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import (
    Array,
    ConvGeneralDilatedT,
    Dtype,
    Initializer,
    PaddingLike,
    PrecisionLike,
    PromoteDtypeFn,
)
from jax import lax

from flax_customgrad.layers.conv.conv import Conv
from flax_customgrad.layers.conv.conv_arguments import (
    check_conv_inputs,
    parameters_with_mask_applied,
)
from flax_customgrad.layers.conv.convolution import ConvConfig, convolution
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.int8.int8_convolution import ConvolutionOp
from flax_customgrad.low_bit.quant_layers.quant_layer import (
    BiasQuantizer,
    GradientShaper,
    KeptOperands,
    QuantizerChoice,
    QuantLayer,
)


def masked_parameters(layer: Any) -> Parameters:
    """The parameters of a convolution layer, its kernel times its mask, and the mask.

    Args:
        layer: a convolution layer.
    """
    params = parameters_with_mask_applied(layer)
    if layer.mask is None:
        return params
    return nnx.State({**params, "mask": jnp.asarray(layer.mask, params["kernel"].dtype)})


def masked_convolution(params: Parameters, x: jax.Array, how: ConvConfig) -> jax.Array:
    """Convolves images with the weights that a mask leaves.

    Args:
        params: `kernel` and `bias` of `convolution`, and `mask`, like the kernel, or no mask.
        x: images of shape (*batch, *size, in_features), float, with any number of batch axes.
        how: the choices that are not arrays.

    Returns:
        Images of shape (*batch, *out, out_features), in the dtype of the computation.
    """
    params = dict(params)
    mask = params.pop("mask", None)
    if mask is not None:
        params["kernel"] = jnp.where(mask == 0, 0, params["kernel"])
    return convolution(nnx.State(params), x, how)


def _convolution_of_codes(
    params: Parameters, x: jax.Array, how: ConvConfig
) -> ConvolutionOp | None:
    """The convolution of int8 codes, of the kind that XLA is fast with; else None.

    A window along one axis of space takes it 60 times as long as with floats.
    """
    geometry = how.geometry
    is_square = len(geometry.window) == 2 and len(set(geometry.window)) == 1
    has_one_batch_axis = x.ndim == params["kernel"].ndim
    fits = is_square and geometry.is_dense and has_one_batch_axis and "mask" not in params
    return ConvolutionOp(how) if fits else None


class QuantConv(Conv, QuantLayer):
    """`Conv` with quantizers for its kernel, its input and the gradient of its output.

    Takes what `flax.nnx.Conv` takes, groups, masks of 0 and 1 and paddings of any kind included,
    but no operation of the user's own, and quantizers.

    Integers are multiplied where `QuantLinear` multiplies them, for images with one batch axis and
    dense square windows, and one scale for all images or one for each. An image with an element
    that is not finite is NaN.

    Args:
        weight: a quantizer for the kernel, such as `FakeQuant(4, axis=-1)`; None, as by
            default, for none.
        activation: a quantizer for the input, such as `FakeQuant(4)`; None, as by default,
            for none.
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
        >>> four_bits = dict(weight=fcg.FakeQuant(4, axis=-1), activation=fcg.FakeQuant(4))
        >>> layer = fcg.QuantConv(
        ...     4, 8, (3, 3), feature_group_count=4, **four_bits, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 16, 16, 4))).shape
        (2, 16, 16, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: PaddingLike = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = nnx.initializers.zeros,
        conv_general_dilated: ConvGeneralDilatedT = lax.conv_general_dilated,
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
            kernel_size,
            strides,
            padding=padding,
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            use_bias=use_bias,
            mask=mask,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            conv_general_dilated=conv_general_dilated,
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
            inputs: float array of shape (*batch, *size, in_features), with any number of batch
                axes.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (*batch, *out, out_features), in `dtype` or the promoted dtype.

        Raises:
            TypeError: the inputs are not floating.
            ValueError: `Conv` would raise it.
        """
        params, x = self._operands(inputs)
        check_conv_inputs(self, x, self.in_features)
        how = self._config(x, out_sharding)
        of_codes = _convolution_of_codes(params, x, how)
        return self._product(params, x, masked_convolution, how, of_codes=of_codes)

    def _parameters(self) -> Parameters:
        return masked_parameters(self)
