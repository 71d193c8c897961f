"""BinaryLinear and BinaryConv: layers whose weights and inputs are signs, of one bit.

    forward   y  = f(sign(x), a sign(W)) + b,  a = mean |W| of an output channel
    backward  dx = df/dx^ where |x| <= 1,  dW = a df/dW^ where |W| <= 1,  db = sum g
    kept      the signs of W and x, a bit each; a bit each for |x| <= 1 and |W| <= 1; and a

f is a product or a convolution, linear in each of its operands x^ and W^. That is XNOR-Net's layer
(arXiv:1603.05279) with the gradients of BinaryNet (arXiv:1602.02830) and Bi-Real Net
(arXiv:1808.00278). The zeros of a convolution's padding are laid around the signs.
"""

from flax_customgrad.low_bit.quant_layers.quant_conv import QuantConv
from flax_customgrad.low_bit.quant_layers.quant_linear import QuantLinear
from flax_customgrad.low_bit.quantizers.binary import BinaryActivation, BinaryWeight

_BINARY = {"weight": BinaryWeight, "activation": BinaryActivation}


class BinaryLinear(QuantLinear):
    """A linear layer of binary weights and inputs, after XNOR-Net, arXiv:1603.05279.

    Takes what `QuantLinear` takes. Where none is given, `weight` is a `BinaryWeight()` and
    `activation` a `BinaryActivation()`; for inputs that stay as they are, use `QuantLinear`.

    Raises:
        TypeError: a quantizer is none.
        ValueError: `residuals` is another word, or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.BinaryLinear(256, 3, use_bias=False, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((8, 256))
        >>> layer(x).shape
        (8, 3)
        >>> x.nbytes, fcg.residual_bytes(layer.activation, x)
        (8192, 256)
    """

    _defaults = _BINARY


class BinaryConv(QuantConv):
    """A convolution of binary weights and inputs, after XNOR-Net, arXiv:1603.05279.

    Takes what `QuantConv` takes. Where none is given, `weight` is a `BinaryWeight()` and
    `activation` a `BinaryActivation()`; for inputs that stay as they are, use `QuantConv`.

    Raises:
        TypeError: a quantizer is none.
        ValueError: `residuals` is another word, or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.BinaryConv(4, 8, (3, 3), padding='VALID', rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 16, 16, 4))).shape
        (2, 14, 14, 8)
    """

    _defaults = _BINARY
