"""MXLinear: a linear layer whose products are of MX blocks, arXiv:2310.10537.

forward   y = Q(x) Q(W) + b
backward  dx = Q(g) Q(W)^T,  dW = Q(x)^T Q(g),  db = sum g
kept      W, and the codes of Q(x) along the rows: 33/32 bytes an element with MXFP8, 17/32 with
          MXFP4

Blocks of `block` elements lie along the axis that a product sums over, which for dW is the rows.
`mx` says how they are scaled, `scaled_linear` how they are multiplied.
"""

import operator
from typing import Any, Literal

import jax
from flax import nnx

from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.replaced_matmul import adopt, operands, refuse_injected
from flax_customgrad.low_bit.microscaling.mx import MX
from flax_customgrad.low_bit.microscaling.scaled_linear import (
    RESIDUALS,
    BlockScaledConfig,
    scaled_linear,
)
from flax_customgrad.low_bit.microscaling.small_floats import E2M1, E4M3, E5M2
from flax_customgrad.numerics.argument_checks import check_word
from flax_customgrad.numerics.products import MatmulConfig

_FORMATS = {"mxfp8": E4M3, "mxfp4": E2M1}
_GRADIENTS = {"e4m3": E4M3, "e5m2": E5M2, "e2m1": E2M1}


class MXLinear(Linear):
    """`Linear` with MXFP8 or MXFP4 operands in its product and in those of its backward.

    Parameters, their names and initial values are those of `flax.nnx.Linear`. Every operand is
    quantized along the axis that its product sums over, from the array itself; `dtype` is that of
    the output. The arithmetic is emulated in float32, with the codes that the OCP specification
    defines. An infinite or NaN element makes its block NaN. Its source is arXiv:2310.10537.

    Attributes:
        format: of inputs and kernel.
        gradient: format of the elements of gradients.
        block: how many elements share a scale.
        scale: how the exponent of a scale is rounded.
        residuals: what is kept of the input between the passes.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.MXLinear(64, 3, format="mxfp4", rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 64))).shape
        (2, 3)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        format: Literal["mxfp8", "mxfp4"] = "mxfp8",
        gradient: Literal["e4m3", "e5m2", "e2m1"] = "e4m3",
        block: int = 32,
        scale: Literal["up", "down"] = "up",
        residuals: Literal["quantized", "original"] = "quantized",
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        """Makes the layer.

        Args:
            in_features: size of the last axis of the inputs.
            out_features: size of the last axis of the outputs.
            format: of inputs and kernel: "mxfp8", elements of E4M3, or "mxfp4", of E2M1.
            gradient: elements of the output's gradient: "e4m3", "e5m2" with 2 bits of mantissa
                and a wider range in a block, or "e2m1" of 4 bits.
            block: how many elements share a scale; 32 in the specification.
            scale: "up" rounds the exponent of a scale so that nothing saturates, as NVIDIA's
                TransformerEngine does; "down" as the specification does.
            residuals: "quantized" keeps codes and scales of the input, "original" the input. The
                gradients are the same.
            rngs: random numbers for the parameters.
            **linear: what else `nnx.Linear` takes: use_bias, dtype, param_dtype, kernel_init and
                so on.

        Raises:
            ValueError: a word is another one; block is below 1; an operation such as
                `dot_general` is given, which this layer cannot call.
        """
        _check("MXLinear", format, gradient, block, scale, residuals)
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        refuse_injected("MXLinear", self)
        self._set(format, gradient, block, scale, residuals)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Linear,
        *,
        format: Literal["mxfp8", "mxfp4"] = "mxfp8",
        gradient: Literal["e4m3", "e5m2", "e2m1"] = "e4m3",
        block: int = 32,
        scale: Literal["up", "down"] = "up",
        residuals: Literal["quantized", "original"] = "quantized",
    ) -> "MXLinear":
        """Turns a linear layer into this one, in place.

        Args:
            layer: an `nnx.Linear` or a subclass.
            format: as for the constructor.
            gradient: as for the constructor.
            block: as for the constructor.
            scale: as for the constructor.
            residuals: as for the constructor.

        Raises:
            TypeError: it is another layer.
            ValueError: as for the constructor.
        """
        _check("MXLinear", format, gradient, block, scale, residuals)
        made = adopt(cls, layer, nnx.Linear)
        made._set(format, gradient, block, scale, residuals)
        return made

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features), float.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.

        Raises:
            TypeError: the inputs are no real floating array.
        """
        params, x = operands(self, inputs, "kernel", "bias")
        up = self.scale == "up"
        recipe = BlockScaledConfig(
            operands=MX(_FORMATS[self.format], self.block, up),
            gradient=MX(_GRADIENTS[self.gradient], self.block, up),
            residuals=self.residuals,
        )
        how = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return scaled_linear(params, x, None, recipe, how)

    def _set(self, format: Any, gradient: Any, block: int, scale: Any, residuals: Any) -> None:
        self.format, self.gradient, self.block = format, gradient, block
        self.scale, self.residuals = scale, residuals


def _check(name: str, format: Any, gradient: Any, block: Any, scale: Any, residuals: Any) -> None:
    check_word(name, "format", format, _FORMATS)
    check_word(name, "gradient", gradient, _GRADIENTS)
    check_word(name, "scale", scale, ("up", "down"))
    check_word(name, "residuals", residuals, RESIDUALS)
    if operator.index(block) < 1:
        raise ValueError(f"{name}: block={block!r} must be 1 or more")
