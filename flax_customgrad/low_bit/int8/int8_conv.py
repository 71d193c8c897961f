"""Int8Conv: a convolution that multiplies in int8.

`.` is the convolution of the layer, `.^T` its transposes, for x and for w:

    forward     y  = (q_x . q_w) s_x s_w + b                  int8, summed in int32

    backward    float         dx = g .^T w_hat                in float
                              dw = x_hat .^T g
                int8          dx = (q_u .^T q_w) s_u          u = g s_w, a scale an image
                              dw = (q_x .^T q_v) s_v          v = g s_x, a scale a channel
                switchback    dx as in int8, dw = x .^T g
                              db = sum g                      in each

    kept        q_x and s_x: a byte an element; x with residuals="original", and for switchback

That is the operation `int8_product` of the product in `int8_convolution`; codes and scales are in
`int8_codes`. A row is an image. Windows overlap, so that a scale for each place in it would stand
inside of the sums: a scale is of an image, or of all.

Source: arXiv:2105.03536 (backward="int8"), arXiv:2304.13013 (backward="switchback")
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import Dtype, Initializer, PaddingLike, PrecisionLike
from jax import lax

from flax_customgrad.layers.conv.conv import Conv
from flax_customgrad.layers.conv.conv_arguments import (
    check_conv_inputs,
    parameters_with_mask_applied,
)
from flax_customgrad.layers.conv.geometry import (
    with_batch_axes,
    with_one_batch_axis,
)
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.layers.replaced_matmul import checked
from flax_customgrad.low_bit.int8.int8_convolution import ConvolutionOp
from flax_customgrad.low_bit.int8.int8_layer import (
    ActivationScale,
    Backward,
    Int8Layer,
    Kept,
    WeightScale,
)
from flax_customgrad.low_bit.int8.int8_product import int8_product


class Int8Conv(Conv, Int8Layer):
    """`Conv` that multiplies in int8 and adds up in int32.

    Takes what `flax.nnx.Conv` takes, but no `conv_general_dilated` or `promote_dtype` of the user's
    own, and the arguments below. Parameters, their names and initial values are those of
    `flax.nnx.Conv`; the kernel that is trained is float. Kernel and images are rounded to int8 in
    each call: no calibration, no state. Strides, dilations, groups, paddings and masks are those of
    `Conv`. Grouped and depthwise convolutions, those of fewer than 4 features or of a spread input,
    the gradients of kernels, and everything on a GPU multiply the codes as floats: that is faster
    and, up to 1040 products a sum, as exact.

    Args:
        backward: "float" multiplies gradients as floats. "int8" rounds the cotangent twice and
            computes the gradients of input and kernel in int8. "switchback" does so for the input
            alone, and computes the kernel's from the input as it came.
        residuals: "quantized" keeps int8 codes of the input, and computes gradients with the
            rounded operands; "original" keeps the input, and computes those of backward="float"
            with the operands as they came. By default the former, and the latter for
            backward="switchback", for which there is no other; "int8" has the former only.
        activation_scale: "per_row": each image has a scale; "per_tensor": they share one.
        weight_scale: "per_channel": each output feature has a scale; "per_tensor": they share one.
            By default the former, and the latter for backward="switchback".
        stochastic_rounding: whether cotangents are rounded up or down at random, so that gradients
            are right on average, instead of to the nearest; with noise from `rngs`.
        rng_collection: the stream of `rngs` to draw from for it.

    Attributes:
        rounding: what is rounded, and with which scales.
        noise: the stream that stochastic rounding draws from, or None.

    Raises:
        ValueError: an argument is none of the words above, or does not go with `backward`; or
            `conv_general_dilated` or `promote_dtype` is the user's own.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Int8Conv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 16, 16, 4))).shape
        (2, 8, 8, 8)

    Source: arXiv:2105.03536 (backward="int8"), arXiv:2304.13013 (backward="switchback")
    """

    _reference = nnx.Conv

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
        mask: jax.Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        conv_general_dilated: Any = lax.conv_general_dilated,
        promote_dtype: Any = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        backward: Backward = "float",
        residuals: Kept | None = None,
        activation_scale: ActivationScale = "per_row",
        weight_scale: WeightScale | None = None,
        stochastic_rounding: bool = False,
        rng_collection: str = "noise",
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
        self._set_rounding(
            backward,
            residuals,
            activation_scale,
            weight_scale,
            stochastic_rounding,
            rng_collection,
            rngs,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (*batch, *size, in_features), float, with any number of batch
                axes.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (*batch, *out, out_features), in `dtype` or the promoted dtype.

        Raises:
            TypeError: the inputs are not floating.
            ValueError: as for `Conv`.
        """
        params, images = checked(self, self._parameters(), inputs)
        check_conv_inputs(self, images, self.in_features)
        packed, key = self._packed, self._key()
        op = ConvolutionOp(self._config(images, out_sharding))
        images, batch = with_one_batch_axis(images, len(self.kernel_size))
        y = int8_product(params, images, packed, key, op, self.rounding)
        return with_batch_axes(y, batch)

    def _parameters(self) -> Parameters:
        return parameters_with_mask_applied(self)
