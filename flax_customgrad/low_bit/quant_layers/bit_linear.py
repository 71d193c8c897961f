"""BitLinear: ternary weights and 8-bit inputs that a norm prepares, BitNet b1.58, arXiv:2402.17764.

    forward   u  = x / rms(x)
              X  = round(u / s),  s = max |u| / 127        of each token
              W^ = clip(round(W / a), -1, 1),  a = mean |W|
              y  = (X W^) s a + b
    backward  du = g W^^T a,  dW = (X s)^T g,  db = sum g
              dx = the backward of the norm, of du
    kept      X in 8 bits, W^ in 2, s and a; and x and its rms for the norm

Both roundings are straight through, and s and a held for constants: the gradient is that of the
quantized product, at X s and W^ a. torchao's layer has the same gradient and leaves the norm to the
user; it bounds s and a from below by 1e-5, where here only zeros get another scale, 1.
"""

from functools import partial
from typing import Any, ClassVar, Self

import jax
from flax import nnx

from flax_customgrad.layers.normalization.rms_norm import RMSNorm
from flax_customgrad.low_bit.quant_layers.quant_linear import QuantLinear
from flax_customgrad.low_bit.quantizers.fake_quant import FakeQuant
from flax_customgrad.low_bit.quantizers.ternary_weights import AbsMean


class BitLinear(QuantLinear):
    """The linear layer of BitNet b1.58: 1.58-bit weights, 8-bit inputs; arXiv:2402.17764.

    Takes what `QuantLinear` takes, and `norm`. Where none is given, `weight` is an `AbsMean()` and
    `activation` a `FakeQuant(8, axis="token")`. The paper's layers have no bias: `use_bias=False`.

    Args:
        in_features: size of the last axis of the inputs.
        out_features: size of the last axis of the outputs.
        norm: what the input goes through first: True for an `RMSNorm` without a scale, False for
            nothing, or a layer, such as an `RMSNorm` with its scale.
        rngs: random numbers for the parameters.
        **kwargs: what else `QuantLinear` takes.

    Attributes:
        norm: that layer, or None.

    Raises:
        TypeError: `norm` is no layer, or a quantizer is none.
        ValueError: `residuals` is another word, or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.BitLinear(16, 3, use_bias=False, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((8, 16))).shape
        (8, 3)
    """

    _defaults: ClassVar = {"weight": AbsMean, "activation": partial(FakeQuant, 8, axis="token")}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        norm: bool | nnx.Module = True,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        self._set_norm(norm)

    @classmethod
    def from_layer(
        cls, layer: nnx.Module, *, norm: bool | nnx.Module = True, **quantizers: Any
    ) -> Self:
        """Turns a linear layer into a `BitLinear`, in place.

        Args:
            layer: an `nnx.Linear` or a subclass.
            norm: as for the constructor.
            **quantizers: `weight`, `activation`, `gradient` and `residuals` of `QuantLinear`.

        Raises:
            TypeError: it is another layer, `norm` is none, or a quantizer is none.
            ValueError: an operation is injected, or `residuals` is another word.
        """
        quantized = super().from_layer(layer, **quantizers)
        quantized._set_norm(norm)
        return quantized

    def _set_norm(self, norm: bool | nnx.Module) -> None:
        if norm is True:
            # Without a scale it draws nothing.
            norm = RMSNorm(self.in_features, use_scale=False, dtype=self.dtype, rngs=nnx.Rngs(0))
        if norm is not False and not callable(norm):
            raise TypeError(f"BitLinear: norm={norm!r} must be a layer, True or False")
        self.norm = nnx.data(None if norm is False else norm)

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
        x = inputs if self.norm is None else self.norm(inputs)
        return super().__call__(x, out_sharding)
