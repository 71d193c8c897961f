"""TernaryLinear and TernaryConv: layers whose weights are -1, 0 or 1, times a scale.

    forward   W_q = q_w(W)
              y   = f(x, W_q) + b
    backward  dx  = df/dx at W_q,  dW = dq_w(df/dW_q at x),  db = sum(g)
    kept      x, and 2 bits for each weight

`f` is a product or a convolution, linear in each operand. It is composed, as that of `QuantLinear`
is: of the backward `dq_w` of the ternary quantizer and that of `f`.

Source: arXiv:1605.04711
"""

from typing import ClassVar

from flax_customgrad.low_bit.quant_layers.quant_conv import QuantConv
from flax_customgrad.low_bit.quant_layers.quant_linear import QuantLinear
from flax_customgrad.low_bit.quantizers.ternary_weights import TWN


class TernaryLinear(QuantLinear):
    """A linear layer of ternary weights.

    Takes what `QuantLinear` takes. By default `weight` is a `TWN()`; a `TTQ()` learns
    its two scales.

    Raises:
        TypeError: `weight` or `activation` is no `Quantizer`, or `gradient` cannot be called.
        ValueError: `residuals` is neither "quantized" nor "original", or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.TernaryLinear(16, 3, rngs=nnx.Rngs(0))
        >>> sorted(set(layer.weight.quantize(layer.kernel[...]).codes.ravel().tolist()))
        [0, 1, 2]

    Source: arXiv:1605.04711
    """

    _defaults: ClassVar = {"weight": TWN}


class TernaryConv(QuantConv):
    """A convolution of ternary weights.

    Takes what `QuantConv` takes. By default `weight` is a `TWN()`; a `TTQ()` learns its
    two scales.

    Raises:
        TypeError: `weight` or `activation` is no `Quantizer`, or `gradient` cannot be called.
        ValueError: `residuals` is neither "quantized" nor "original", or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.TernaryConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 16, 16, 4))).shape
        (2, 16, 16, 8)

    Source: arXiv:1605.04711
    """

    _defaults: ClassVar = {"weight": TWN}
