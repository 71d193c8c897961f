"""QuantConvTranspose: a transposed convolution whose operands go through quantizers.

Forward, backward and what is kept are those of `QuantConv`, with the geometry of `ConvTranspose`.
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.layers.conv.conv_arguments import check_conv_inputs
from flax_customgrad.layers.conv.conv_transpose import ConvTranspose
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.low_bit.quant_layers.quant_conv import masked_convolution, masked_parameters
from flax_customgrad.low_bit.quant_layers.quant_layer import QuantLayer, quantizing


class QuantConvTranspose(ConvTranspose, QuantLayer):
    """`ConvTranspose` with quantizers for its kernel, its input and the gradient of its output.

    Takes what `flax.nnx.ConvTranspose` takes, and `weight`, `activation`, `gradient` and
    `residuals` of `QuantLinear`. With `transpose_kernel` the output channels are the kernel's axis
    -2.

    Raises:
        TypeError: a quantizer is none.
        ValueError: `residuals` is another word, or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.QuantConvTranspose(
        ...     4, 8, (4, 4), strides=2, weight=fcg.FakeQuant(4, axis=-1), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 16, 16, 4))).shape
        (2, 32, 32, 8)
    """

    @quantizing(nnx.ConvTranspose.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

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
