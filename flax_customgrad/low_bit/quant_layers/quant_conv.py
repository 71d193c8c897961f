"""QuantConv: a convolution whose kernel, input and gradient go through quantizers.

    forward   y  = conv(q_x(x), q_w(W)) + b
    backward  dx = dq_x(the gradient of conv for x, at q_w(W))
              dW = dq_w(the gradient of conv for W, at q_x(x))
              db = the sum of g over images and space
    kept      the codes of W and x, or, with residuals="original", W and x, as in `QuantLinear`

dq is the backward of a quantizer; `convolution` writes conv out. Quantizers see images with the
batch axes that they came with, and the kernel times its mask. What a mask takes out stays out: a
binary code is never 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.conv.conv import Conv
from flax_customgrad.layers.conv.conv_arguments import (
    check_conv_inputs,
    parameters_with_mask_applied,
    with_one_batch_axis,
)
from flax_customgrad.layers.conv.convolution import ConvConfig, convolution
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.quant_layers.quant_layer import QuantLayer, quantizing


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
    state = nnx.State(params)
    return with_one_batch_axis(lambda x: convolution(state, x, how), x, len(how.geometry.window))


class QuantConv(Conv, QuantLayer):
    """`Conv` with quantizers for its kernel, its input and the gradient of its output.

    Takes what `flax.nnx.Conv` takes, groups, masks of 0 and 1 and paddings of any kind included,
    and `weight`, `activation`, `gradient` and `residuals` of `QuantLinear`.

    Raises:
        TypeError: a quantizer is none.
        ValueError: `residuals` is another word, or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> four_bits = dict(weight=fcg.FakeQuant(4, axis=-1), activation=fcg.FakeQuant(4))
        >>> layer = fcg.QuantConv(
        ...     4, 8, (3, 3), feature_group_count=4, **four_bits, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 16, 16, 4))).shape
        (2, 16, 16, 8)
    """

    @quantizing(nnx.Conv.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

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
        return self._product(params, x, masked_convolution, self._config(x, out_sharding))

    def _parameters(self) -> Parameters:
        return masked_parameters(self)
