"""FeedbackConv: a convolution with feedback alignment.

    forward   y       = conv(x, kernel) + bias
    backward  dx      = the gradient of conv(x, feedback) for x     feedback: fixed and random
              dkernel = that of conv(x, kernel) for the kernel
              dbias   = the sum of g over images and space
    kept      x without its padding, kernel, bias and feedback, as they came

The backward is composed: the operation is `alignment.apply_with_feedback` of `convolution`, whose
page writes these gradients out, and whose lowerings and float32 sums are those of `Conv`.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import (
    ConvGeneralDilatedT,
    Dtype,
    Initializer,
    PaddingLike,
    PrecisionLike,
    PromoteDtypeFn,
)
from jax import lax

from flax_customgrad.gradients.feedback.alignment import apply_with_feedback, check_inputs
from flax_customgrad.gradients.feedback.feedback_variable import random_feedback
from flax_customgrad.layers.conv.conv import Conv
from flax_customgrad.layers.conv.conv_arguments import (
    check_conv_inputs,
    parameters_with_mask_applied,
)
from flax_customgrad.layers.conv.convolution import convolution
from flax_customgrad.layers.replaced_matmul import adopted


class FeedbackConv(Conv):
    """A convolution that sends its error back through a fixed random kernel.

    Constructor, parameters, initial values and results are those of `Conv`, and so of
    `flax.nnx.Conv`; `feedback` is one Variable more. A mask on the kernel holds for the feedback as
    well: what is not connected sends nothing back. Inside `use_autodiff` the backward stays.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        kernel_size: shape of the window, an int for one axis of space.
        strides: distance between windows, an int or one for each axis of space.
        padding: "SAME", "VALID", "CIRCULAR", "CAUSAL", "REFLECT", an int, or a pair of ints for
            each axis of space.
        input_dilation: dilation of the inputs, an int or one for each axis of space.
        kernel_dilation: dilation of the window, an int or one for each axis of space.
        feature_group_count: number of groups of features.
        use_bias: whether to add a bias.
        mask: array of the kernel's shape that the kernel and the feedback are multiplied by.
        dtype: dtype of the computation; by default inferred from inputs and parameters.
        param_dtype: dtype of the parameters and of the feedback.
        precision: `jax.lax.Precision` of every product, forward and backward.
        kernel_init: initializer of the kernel.
        bias_init: initializer of the bias.
        conv_general_dilated: an operation of your own is refused when the layer is called.
        promote_dtype: as for `conv_general_dilated`.
        preferred_element_type: dtype of the forward convolution's result.
        rngs: random number generators; the feedback is drawn from `params`, after the parameters.
        kernel_metadata: metadata of the kernel's Variable, such as its sharding.
        bias_metadata: metadata of the bias's Variable.
        feedback_init: initializer of the feedback kernel; by default that of a kernel.
        feedback_metadata: metadata of its Variable, such as its sharding.

    Attributes:
        feedback: the kernel of the backward, a `Feedback` of the shape of `kernel`, in
            `param_dtype`.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.FeedbackConv(3, 4, (3, 3), strides=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 3))).shape
        (2, 4, 4, 4)
        >>> layer.feedback.shape
        (3, 3, 3, 4)

    Source: arXiv:1411.0247
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
        mask: jax.Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        conv_general_dilated: ConvGeneralDilatedT = lax.conv_general_dilated,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        feedback_init: Initializer = default_kernel_init,
        feedback_metadata: Mapping[str, Any] = MappingProxyType({}),
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
        self.feedback = random_feedback(self, rngs, feedback_init, feedback_metadata)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Conv,
        *,
        rngs: nnx.Rngs,
        feedback_init: Initializer = default_kernel_init,
        feedback_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Turns a layer into one with feedback alignment, in place.

        `layer` itself changes and is returned: pass `nnx.clone(layer)` to keep the original.

        Args:
            layer: an `nnx.Conv`, trained or not.
            rngs: random number generators; the feedback is drawn from `params`.
            feedback_init: as for the constructor.
            feedback_metadata: as for the constructor.

        Returns:
            `layer`, which is now of this class.

        Raises:
            TypeError: the layer is no `nnx.Conv`, or computes something else.
            ValueError: an operation is injected.
        """
        with adopted(cls, layer, nnx.Conv) as aligned:
            aligned.feedback = random_feedback(aligned, rngs, feedback_init, feedback_metadata)
        return aligned

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (*batch, *size, in_features), with any number of batch axes.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (*batch, *out, out_features), in `dtype` or the promoted dtype.

        Raises:
            ValueError: the layer has a `conv_general_dilated` or `promote_dtype` of the user's own,
                or `Conv` would raise it.
            TypeError: the inputs are integers or complex.
        """
        injected = (
            self.conv_general_dilated is not lax.conv_general_dilated
            or self.promote_dtype is not dtypes.promote_dtype
        )
        params, feedback = parameters_with_mask_applied(self), self.feedback[...]
        images = check_inputs(self, params, inputs, injected)
        check_conv_inputs(self, images, self.in_features)
        if self.mask is not None:
            feedback *= self.mask
        config = self._config(images, out_sharding)
        return apply_with_feedback(params, feedback, images, convolution, config)
