"""FeedbackLinear: a linear layer with feedback alignment.

    forward   y[..., o]     = sum_i x[..., i] kernel[i, o] + bias[o]
    backward  dx[..., i]    = sum_o g[..., o] feedback[i, o]      feedback: fixed and random
              dkernel[i, o] = sum_... x[..., i] g[..., o]
              dbias[o]      = sum_... g[..., o]
    kept      x, kernel, bias and feedback, as they came

The backward is composed: the operation is `alignment.apply_with_feedback` of `linear`, whose dtypes
and float32 sums are those of `Linear`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import DotGeneralT, Dtype, Initializer, PrecisionLike, PromoteDtypeFn
from jax import lax

from flax_customgrad.gradients.feedback.alignment import apply_with_feedback, check_inputs
from flax_customgrad.gradients.feedback.feedback_variable import random_feedback
from flax_customgrad.layers.drop_in import parameters
from flax_customgrad.layers.linear.linear import Linear, linear
from flax_customgrad.layers.replaced_matmul import adopted
from flax_customgrad.numerics.products import MatmulConfig


class FeedbackLinear(Linear):
    """A linear layer that sends its error back through a fixed random matrix.

    Constructor, parameters, initial values and results are those of `Linear`, and so of
    `flax.nnx.Linear`; `feedback` is one Variable more. Inside `use_autodiff` the backward stays.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        use_bias: whether to add a bias.
        dtype: dtype of the computation; by default inferred from inputs and parameters.
        param_dtype: dtype of the parameters and of the feedback.
        precision: `jax.lax.Precision` of every product, forward and backward.
        kernel_init: initializer of the kernel.
        bias_init: initializer of the bias.
        dot_general: an operation of your own is refused when the layer is called.
        promote_dtype: as for `dot_general`.
        preferred_element_type: dtype of the forward product's result.
        rngs: random number generators; the feedback is drawn from `params`, after the parameters.
        kernel_metadata: metadata of the kernel's Variable, such as its sharding.
        bias_metadata: metadata of the bias's Variable.
        feedback_init: initializer of the feedback matrix; by default that of a kernel, of
            deviation 1 / sqrt(in_features). Its size is that of the errors that it sends back.
        feedback_metadata: metadata of its Variable, such as its sharding.

    Attributes:
        feedback: the matrix, a `Feedback` of shape (in_features, out_features) in `param_dtype`.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.FeedbackLinear(3, 4, rngs=nnx.Rngs(0))
        >>> gradient = jax.grad(lambda x: jnp.sum(layer(x)))(jnp.ones((2, 3)))
        >>> bool(jnp.allclose(gradient[0], layer.feedback.sum(axis=1)))
        True

    Source: arXiv:1411.0247
    """

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
        dot_general: DotGeneralT = lax.dot_general,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        feedback_init: Initializer = default_kernel_init,
        feedback_metadata: Mapping[str, Any] = MappingProxyType({}),
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
        self.feedback = random_feedback(self, rngs, feedback_init, feedback_metadata)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Linear,
        *,
        rngs: nnx.Rngs,
        feedback_init: Initializer = default_kernel_init,
        feedback_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Turns a layer into one with feedback alignment, in place.

        `layer` itself changes and is returned: pass `nnx.clone(layer)` to keep the original.

        Args:
            layer: an `nnx.Linear`, trained or not.
            rngs: random number generators; the feedback is drawn from `params`.
            feedback_init: as for the constructor.
            feedback_metadata: as for the constructor.

        Returns:
            `layer`, which is now of this class.

        Raises:
            TypeError: the layer is no `nnx.Linear`, or computes something else.
            ValueError: an operation is injected.
        """
        with adopted(cls, layer, nnx.Linear) as aligned:
            aligned.feedback = random_feedback(aligned, rngs, feedback_init, feedback_metadata)
        return aligned

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features), float.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.

        Raises:
            ValueError: the layer has a `dot_general` or `promote_dtype` of the user's own.
            TypeError: the inputs are integers or complex.
        """
        injected = (
            self.dot_general is not lax.dot_general
            or self.promote_dtype is not dtypes.promote_dtype
        )
        params, feedback = parameters(self, "kernel", "bias"), self.feedback[...]
        x = check_inputs(self, params, inputs, injected)
        config = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return apply_with_feedback(params, feedback, x, linear, config)
