"""BitLinear: ternary weights and 8-bit inputs that a norm prepares, as in BitNet b1.58.

    forward   u   = x / rms(x)
              u_q = s round(u / s),  s = max |u| / 127        of each token
              W_q = a clip(round(W / a), -1, 1),  a = mean |W|
              y   = u_q W_q + b
    backward  du  = g W_q^T,  dW = u_q^T g,  db = sum(g)
              dx  = the backward of the norm, of du
    kept      the codes of u in 8 bits, those of W in 2, s and a; and x and its rms for the norm

It is composed: of the backwards of `RMSNorm` and of `QuantLinear`. Both roundings are
straight-through, and s and a held constant. torchao's layer has the same gradient and leaves the
norm to the user; it bounds s and a from below by 1e-5, where here only zeros get another scale, 1.

Source: arXiv:2402.17764
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import DotGeneralT, Dtype, Initializer, PrecisionLike, PromoteDtypeFn
from jax import lax

from flax_customgrad.layers.normalization.rms_norm import RMSNorm
from flax_customgrad.layers.stacked import repeated, stack_axes
from flax_customgrad.low_bit.quant_layers.quant_layer import (
    BiasQuantizer,
    GradientShaper,
    KeptOperands,
    QuantizerChoice,
)
from flax_customgrad.low_bit.quant_layers.quant_linear import QuantLinear
from flax_customgrad.low_bit.quantizers.fake_quant import FakeQuant
from flax_customgrad.low_bit.quantizers.ternary_weights import AbsMean


class BitLinear(QuantLinear):
    """The linear layer of BitNet b1.58: 1.58-bit weights, 8-bit inputs.

    Takes what `QuantLinear` takes, and `norm`. By default `weight` is an `AbsMean()` and
    `activation` a `FakeQuant(8, axis="token")`; with None weights or inputs stay as they are. The
    paper's layers have no bias: `use_bias=False`.

    Args:
        norm: what the input goes through first: True for an `RMSNorm` without a scale, False for
            nothing, or a layer, such as an `RMSNorm` with its scale.

    Attributes:
        norm: that layer, or None.

    Raises:
        TypeError: `norm` is neither a layer nor a bool, `weight` or `activation` is no `Quantizer`,
            or `gradient` cannot be called.
        ValueError: `residuals` is neither "quantized" nor "original", or an operation is injected.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.BitLinear(16, 3, use_bias=False, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((8, 16))).shape
        (8, 3)

    Source: arXiv:2402.17764
    """

    _defaults: ClassVar = {"weight": AbsMean, "activation": partial(FakeQuant, 8, axis="token")}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = nnx.initializers.zeros,
        dot_general: DotGeneralT = lax.dot_general,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        norm: bool | nnx.Module = True,
        weight: QuantizerChoice = "default",
        activation: QuantizerChoice = "default",
        bias: BiasQuantizer = None,
        gradient: GradientShaper | None = None,
        residuals: KeptOperands = "quantized",
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dot_general=dot_general,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            weight=weight,
            activation=activation,
            bias=bias,
            gradient=gradient,
            residuals=residuals,
        )
        self._set_norm(norm)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Module,
        *,
        norm: bool | nnx.Module = True,
        weight: QuantizerChoice = "default",
        activation: QuantizerChoice = "default",
        bias: BiasQuantizer = None,
        gradient: GradientShaper | None = None,
        residuals: KeptOperands = "quantized",
    ) -> Self:
        """Turns a linear layer into a `BitLinear`, in place.

        `layer` itself changes and is returned: pass `nnx.clone(layer)` to keep the original.

        Args:
            layer: an `nnx.Linear` or a subclass.
            norm: as for the constructor.
            weight: as for the constructor.
            activation: as for the constructor.
            bias: as for the constructor.
            gradient: as for the constructor.
            residuals: as for the constructor.

        Returns:
            `layer`, which is now of this class.

        Raises:
            TypeError: `layer` is another layer, or an argument is one that the constructor refuses.
            ValueError: an operation is injected, or `residuals` is neither "quantized" nor
                "original".
        """
        _check_norm(norm)
        quantized = super().from_layer(
            layer,
            weight=weight,
            activation=activation,
            bias=bias,
            gradient=gradient,
            residuals=residuals,
        )
        quantized._set_norm(norm)
        return quantized

    def _set_norm(self, norm: bool | nnx.Module) -> None:
        if norm is True:
            # Without a scale it draws nothing.
            norm = RMSNorm(self.in_features, use_scale=False, dtype=self.dtype, rngs=nnx.Rngs(0))
        _check_norm(norm)
        self.norm = nnx.data(None if norm is False else repeated(norm, stack_axes(self)))

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


def _check_norm(norm: Any) -> None:
    if not isinstance(norm, bool) and not callable(norm):
        raise TypeError(f"BitLinear: norm={norm!r} must be a layer, True or False")
