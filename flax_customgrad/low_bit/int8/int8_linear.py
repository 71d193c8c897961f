"""Int8Linear: a linear layer that multiplies in int8.

    forward     y  = (q_x q_w) s_x s_w + b                    int8, summed in int32

    backward    float         dx = g w_hat^T                  in float
                              dw = x_hat^T g
                int8          dx = (q_u q_w^T) s_u            u = g s_w, a scale a row
                              dw = (q_x^T q_v) s_v            v = g s_x, a scale a channel
                switchback    dx as in int8, dw = x^T g
                              db = sum g                      in each

    kept        q_x and s_x: a byte an element; x with residuals="original", and for switchback

That is the operation `int8_product` of the product in `int8_matmul`; codes and scales are in
`int8_codes`.

Source: arXiv:2105.03536 (backward="int8"), arXiv:2304.13013 (backward="switchback")
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import lax

from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.replaced_matmul import checked
from flax_customgrad.low_bit.int8.int8_layer import (
    ActivationScale,
    Backward,
    Int8Layer,
    Kept,
    WeightScale,
)
from flax_customgrad.low_bit.int8.int8_matmul import MatmulOp
from flax_customgrad.low_bit.int8.int8_product import int8_product
from flax_customgrad.numerics.products import MatmulConfig


class Int8Linear(Linear, Int8Layer):
    """`Linear` that multiplies in int8 and adds up in int32.

    Takes what `flax.nnx.Linear` takes, but no `dot_general` or `promote_dtype` of the user's own,
    and the arguments below. Parameters, their names and initial values are those of
    `flax.nnx.Linear`; the kernel that is trained is float. Kernel and input are rounded to int8 in
    each call: no calibration, no state. A CPU multiplies the codes of the kernel's gradient as
    float32, which is faster there.

    Args:
        backward: "float" multiplies gradients as floats. "int8" rounds the cotangent twice and
            computes the gradients of input and kernel in int8. "switchback" does so for the input
            alone, and computes the kernel's from the input as it came.
        residuals: "quantized" keeps int8 codes of the input, and computes gradients with the
            rounded operands; "original" keeps the input, and computes those of backward="float"
            with the operands as they came. By default the former, and the latter for
            backward="switchback", for which there is no other; "int8" has the former only.
        activation_scale: "per_row": each row of the inputs, a token, has a scale; "per_tensor":
            they share one.
        weight_scale: "per_channel": each output feature has a scale; "per_tensor": they share one.
            By default the former, and the latter for backward="switchback".
        stochastic_rounding: whether cotangents are rounded up or down at random, so that gradients
            are right on average, instead of to the nearest; with noise from `rngs`.
        rng_collection: the stream of `rngs` to draw from for it.

    Attributes:
        rounding: what is rounded, and with which scales.
        noise: the stream that stochastic rounding draws from, or None.

    Raises:
        ValueError: an argument is none of the words above, or does not go with `backward`; or
            `dot_general` or `promote_dtype` is the user's own.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Int8Linear(16, 3, backward="int8", rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((8, 16))).shape
        (8, 3)

    Source: arXiv:2105.03536 (backward="int8"), arXiv:2304.13013 (backward="switchback")
    """

    _reference = nnx.Linear

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
        bias_init: Initializer = default_bias_init,
        dot_general: Any = lax.dot_general,
        promote_dtype: Any = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        backward: Backward = "float",
        residuals: Kept | None = None,
        activation_scale: ActivationScale = "per_row",
        weight_scale: WeightScale | None = None,
        stochastic_rounding: bool = False,
        rng_collection: str = "noise",
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
        )
        self._set_rounding(
            backward,
            residuals,
            activation_scale,
            weight_scale,
            stochastic_rounding,
            rng_collection,
            rngs,
        )

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
        params, x = checked(self, self._parameters(), inputs)
        op = MatmulOp(
            MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        )
        return int8_product(params, x, self._packed, self._key(), op, self.rounding)
