"""Conv: a convolution with a kernel of its own, and a bias; the mathematics is in `convolution`."""

from typing import Any

import jax
from flax import nnx
from jax import lax

from flax_customgrad.layers.conv.conv_arguments import (
    check_conv_inputs,
    has_own_shapes,
    parameters_with_mask_applied,
    per_axis,
    resolve_padding,
)
from flax_customgrad.layers.conv.convolution import ConvConfig, convolution
from flax_customgrad.layers.conv.geometry import Geometry
from flax_customgrad.layers.drop_in import (
    given,
    has_custom_product,
    has_known_size,
    parameters,
)
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import MatmulConfig


class Conv(nnx.Conv):
    """`nnx.Conv` with a lowering for its shape, forward and backward, and the bare input kept.

    Constructor, parameters, initial values and results are those of `flax.nnx.Conv`. On a CPU
    grouped, depthwise, patch and 1 x 1 convolutions and their gradients are 2 to 150 times as fast;
    `choose_lowering` has the table, and `use_lowering` chooses from it. With a
    `conv_general_dilated` or `promote_dtype` of the user's own, a kernel or bias of another shape
    than the layer says, and for integer or complex inputs or images of symbolic size, the layer
    computes as nnx does and JAX differentiates that.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Conv(4, 8, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 16, 16, 4))).shape
        (2, 16, 16, 8)
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (*batch, *size, in_features), with any number of batch axes.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (*batch, *out, out_features), in `dtype` or the promoted dtype.

        Raises:
            ValueError: features that do not divide by `feature_group_count`, inputs with other
                features or too few axes, a mask of another shape than the kernel, or strides,
                dilations or padding that do not fit `kernel_size`.
        """
        images, params = as_array(inputs), parameters(self, "kernel", "bias")
        if (
            self.conv_general_dilated is not lax.conv_general_dilated
            or not has_own_shapes(self, params)
            or not has_known_size(images, len(self.kernel_size))
            or not has_custom_product(self, images, params)
        ):
            return super().__call__(inputs, **given(out_sharding=out_sharding))
        check_conv_inputs(self, images, self.in_features)
        params, config = parameters_with_mask_applied(self), self._config(images, out_sharding)
        return convolution(params, images, config)

    def _config(self, inputs: jax.Array, out_sharding: Any) -> ConvConfig:
        groups, window = self.feature_group_count, tuple(self.kernel_size)
        if self.in_features % groups or self.out_features % groups:
            raise ValueError(
                f"in_features={self.in_features} and out_features={self.out_features} must be "
                f"multiples of feature_group_count={groups}"
            )
        rank = len(window)
        strides = per_axis("strides", self.strides, rank)
        dilation = per_axis("kernel_dilation", self.kernel_dilation, rank)
        size = inputs.shape[-1 - rank : -1]
        input_dilation = per_axis("input_dilation", self.input_dilation, rank)
        padding, boundary = resolve_padding(
            self.padding, size, window, strides, dilation, input_dilation
        )
        if boundary is not None:
            size = boundary.padded_size(size)
        geometry = Geometry(
            size,
            window,
            self.in_features,
            self.out_features,
            strides,
            padding,
            input_dilation,
            dilation,
            groups,
        )
        matmul = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return ConvConfig(geometry, boundary, False, matmul)
