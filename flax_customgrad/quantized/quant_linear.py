"""QuantLinear: a linear layer whose kernel, input and gradient go through quantizers.

forward   y  = q_x(x) q_w(W) + b
backward  dx = dq_x(g q_w(W)^T),  dW = dq_w(q_x(x)^T g),  db = sum g
where dq is the backward of a quantizer
kept      the codes of W and x, or, with residuals="original", W and x, which then stand in
for their quantized values in dx and dW
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.arithmetic import Arithmetic
from flax_customgrad.linear.linear import Linear, linear
from flax_customgrad.quantized.layer import (
    Keeping,
    Shaper,
    adopt,
    operands,
    quantized_product,
    refuse_injected,
    set_quantizers,
)
from flax_customgrad.quantized.product import Map
from flax_customgrad.quantized.quantizer import Quantizer


class QuantLinear(Linear):
    """`Linear` with quantizers for its kernel, its input and the gradient of its output.

    Parameters, their names and initial values are those of `flax.nnx.Linear`; the kernel that is
    trained is not quantized, and goes through its quantizer in each call.

    Attributes:
        weight: the quantizer of the kernel, or None.
        activation: the quantizer of the input, or None.
        gradient: the layer that the output goes through for the sake of its gradient, or None.
        residuals: what is kept between the passes.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> four_bits = dict(weight=fcg.FakeQuant(4, axis=-1), activation=fcg.FakeQuant(4))
        >>> layer = fcg.QuantLinear(16, 3, **four_bits, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((8, 16))
        >>> layer(x).shape
        (8, 3)
        >>> fcg.residual_bytes(layer, x), x.nbytes
        (104, 512)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight: Quantizer | None = None,
        activation: Quantizer | None = None,
        gradient: Shaper | None = None,
        residuals: Keeping = "quantized",
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        """Makes the layer.

        Args:
            in_features: size of the last axis of the inputs.
            out_features: size of the last axis of the outputs.
            weight: a quantizer for the kernel, such as `FakeQuant(4, axis=-1)`; None for none.
            activation: a quantizer for the input; None for none.
            gradient: a layer that changes nothing but the gradient of the output; None for none.
            residuals: "quantized" keeps the codes of kernel and input, and the gradient is that of
                the quantized product; "original" keeps both as they came, and computes the
                gradient of the product with them.
            rngs: random numbers for the parameters.
            **linear: what else `nnx.Linear` takes, but no `dot_general` or `promote_dtype`.

        Raises:
            TypeError: a quantizer is none.
            ValueError: `residuals` is another word, or an operation is injected.
        """
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        refuse_injected("QuantLinear", self)
        set_quantizers(self, weight, activation, gradient, residuals)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Linear,
        *,
        weight: Quantizer | None = None,
        activation: Quantizer | None = None,
        gradient: Shaper | None = None,
        residuals: Keeping = "quantized",
    ) -> "QuantLinear":
        """Turns a linear layer into a quantized one, in place.

        Args:
            layer: an `nnx.Linear` or a subclass.
            weight: as for the constructor.
            activation: as for the constructor.
            gradient: as for the constructor.
            residuals: as for the constructor.

        Raises:
            TypeError: it is another layer, or a quantizer is none.
            ValueError: an operation is injected, or `residuals` is another word.
        """
        quantized = adopt(cls, layer, nnx.Linear)
        set_quantizers(quantized, weight, activation, gradient, residuals)
        return quantized

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
        params, x = operands(self, inputs, "kernel", "bias")
        how = Arithmetic(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return quantized_product(self, params, x, Map(linear, (how,)))
