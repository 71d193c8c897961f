"""QuantLinear: a linear layer whose kernel, input and gradient go through quantizers.

    forward   y  = q_x(x) q_w(W) + b
    backward  dx = dq_x(g q_w(W)^T),  dW = dq_w(q_x(x)^T g),  db = sum g
    kept      the codes of W and x, or, with residuals="original", W and x, which then stand in
              for their quantized values in dx and dW

dq is the backward of a quantizer. The sums are those of `linear`, in float32.
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.layers.linear.linear import Linear, linear
from flax_customgrad.low_bit.quant_layers.quant_layer import QuantLayer, quantizing
from flax_customgrad.numerics.products import MatmulConfig


class QuantLinear(Linear, QuantLayer):
    """`Linear` with quantizers for its kernel, its input and the gradient of its output.

    Parameters, their names and initial values are those of `flax.nnx.Linear`; the kernel that is
    trained is not quantized, and goes through its quantizer in each call.

    Args:
        *args: what `flax.nnx.Linear` takes, by name or by position.
        weight: a quantizer for the kernel, such as `FakeQuant(4, axis=-1)`; None for none.
        activation: a quantizer for the input; None for none.
        gradient: a layer that changes nothing but the gradient of the output; None for none.
        residuals: "quantized" keeps the codes of kernel and input, and the gradient is that of
            the quantized product; "original" keeps both as they came, and computes the gradient of
            the product with them.
        **kwargs: what `flax.nnx.Linear` takes, but no operation of the user's own.

    Raises:
        TypeError: a quantizer is none.
        ValueError: `residuals` is another word, or an operation is injected.

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

    @quantizing(nnx.Linear.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

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
        return self._product(params, x, linear, how)
