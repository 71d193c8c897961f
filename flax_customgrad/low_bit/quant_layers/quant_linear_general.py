"""QuantLinearGeneral: a product over several axes, whose operands go through quantizers.

With B the batch axes, I the contracted axes of x and O the new axes of y:

    forward   y[B, ..., O] = sum_I q_x(x)[B, ..., I] q_w(W)[B, I, O] + b[B, O]
    backward  dx           = dq_x(sum_O g[B, ..., O] q_w(W)[B, I, O])
              dW           = dq_w(sum_... q_x(x)[B, ..., I] g[B, ..., O])
              db[B, O]     = sum_... g[B, ..., O]
    kept      the codes of W and x, or, with residuals="original", W and x, as in `QuantLinear`

dq is the backward of a quantizer. The sums are those of `linear_general`, in float32.
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.layers.linear.linear_general import LinearGeneral, linear_general
from flax_customgrad.low_bit.quant_layers.quant_layer import QuantLayer, quantizing
from flax_customgrad.numerics.products import MatmulConfig


class QuantLinearGeneral(LinearGeneral, QuantLayer):
    """`LinearGeneral` with quantizers for its kernel, its input and the gradient of its output.

    Takes what `flax.nnx.LinearGeneral` takes, and `weight`, `activation`, `gradient` and
    `residuals` of `QuantLinear`. A quantizer's axes are those of the kernel, (*batch,
    *in_features, *out_features), and of the input as it comes.

    Raises:
        TypeError: a quantizer is none.
        ValueError: `residuals` is another word, or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.QuantLinearGeneral(
        ...     (2, 3), (4, 5), axis=(1, -1), weight=fcg.FakeQuant(4, axis=(-2, -1)),
        ...     rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 2, 3))).shape
        (16, 4, 5)
    """

    @quantizing(nnx.LinearGeneral.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

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
