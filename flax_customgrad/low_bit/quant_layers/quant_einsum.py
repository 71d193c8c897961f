"""QuantEinsum: an einsum whose operands go through quantizers.

Written for 'nta,hab->nthb', as in `einsum`; an einsum is linear in each operand:

    forward   y[n,t,h,b] = sum_a q_x(x)[n,t,a] q_w(W)[h,a,b] + c[h,b]
    backward  dx         = dq_x(sum_hb g[n,t,h,b] q_w(W)[h,a,b])
              dW         = dq_w(sum_nt q_x(x)[n,t,a] g[n,t,h,b])
              dc[h,b]    = sum_nt g[n,t,h,b]
    kept      the codes of W and x, or, with residuals="original", W and x, as in `QuantLinear`

dq is the backward of a quantizer. The sums are those of `einsum`, in float32.
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.layers.linear.einsum import Einsum, einsum
from flax_customgrad.low_bit.quant_layers.quant_layer import QuantLayer, quantizing
from flax_customgrad.numerics.products import MatmulConfig


class QuantEinsum(Einsum, QuantLayer):
    """`Einsum` with quantizers for its kernel, its input and the gradient of its output.

    Takes what `flax.nnx.Einsum` takes, and `weight`, `activation`, `gradient` and `residuals` of
    `QuantLinear`.

    Raises:
        TypeError: a quantizer is none.
        ValueError: `residuals` is another word, or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.QuantEinsum(
        ...     'nta,hab->nthb', (8, 2, 4), (8, 4), weight=fcg.FakeQuant(4, axis=(0, 2)),
        ...     rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 11, 2))).shape
        (16, 11, 8, 4)
    """

    @quantizing(nnx.Einsum.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: float array with an axis per label of the first operand.
            einsum_str: an equation that goes before that of the constructor, or None.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array with an axis per label behind the arrow.

        Raises:
            TypeError: the inputs are not floating.
            ValueError: there is no equation, it does not fit inputs and kernel, or it repeats a
                label within an operand or broadcasts an axis of size 1.
        """
        params, x = self._operands(inputs)
        kernel = params["kernel"]
        equation = self._regular_equation(einsum_str, x, kernel)
        how = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return self._product(params, x, einsum, equation, how)
