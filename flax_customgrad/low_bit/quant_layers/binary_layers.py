"""BinaryLinear and BinaryConv: layers whose weights and inputs are signs, of one bit.

    forward   x_q = sign(x),  W_q = a sign(W),  a = mean |W| of an output channel
              y   = f(x_q, W_q) + b
    backward  dx  = df/dx_q where |x| <= 1,  dW = a df/dW_q where |W| <= 1,  db = sum(g)
    kept      the signs of W and x, a bit each; a bit each for |x| <= 1 and |W| <= 1; and a

`f` is a product or a convolution, linear in each operand. It is composed, as that of `QuantLinear`
is: of the backwards of `BinaryActivation` and `BinaryWeight`, and of that of `f`. This is XNOR-
Net's layer with the gradients of BinaryNet (arXiv:1602.02830) and Bi-Real Net (arXiv:1808.00278).
The zeros of a convolution's padding are laid around the signs.

Source: arXiv:1603.05279
"""

from flax_customgrad.low_bit.quant_layers.quant_conv import QuantConv
from flax_customgrad.low_bit.quant_layers.quant_linear import QuantLinear
from flax_customgrad.low_bit.quantizers.binary import BinaryActivation, BinaryWeight

_BINARY = {"weight": BinaryWeight, "activation": BinaryActivation}


class BinaryLinear(QuantLinear):
    """A linear layer of binary weights and inputs, after XNOR-Net.

    Takes what `QuantLinear` takes. By default `weight` is a `BinaryWeight()` and `activation` a
    `BinaryActivation()`; with None weights or inputs stay as they are.

    Raises:
        TypeError: `weight` or `activation` is no `Quantizer`, or `gradient` cannot be called.
        ValueError: `residuals` is neither "quantized" nor "original", or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.BinaryLinear(256, 3, use_bias=False, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((8, 256))
        >>> layer(x).shape
        (8, 3)
        >>> x.nbytes, fcg.residual_bytes(layer.activation, x)
        (8192, 256)

    Source: arXiv:1603.05279
    """

    _defaults = _BINARY


class BinaryConv(QuantConv):
    """A convolution of binary weights and inputs, after XNOR-Net.

    Takes what `QuantConv` takes. By default `weight` is a `BinaryWeight()` and `activation` a
    `BinaryActivation()`; with None weights or inputs stay as they are.

    Raises:
        TypeError: `weight` or `activation` is no `Quantizer`, or `gradient` cannot be called.
        ValueError: `residuals` is neither "quantized" nor "original", or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.BinaryConv(4, 8, (3, 3), padding='VALID', rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 16, 16, 4))).shape
        (2, 14, 14, 8)

    Source: arXiv:1603.05279
    """

    _defaults = _BINARY
