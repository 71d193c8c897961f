"""FeedbackLinear: a linear layer with feedback alignment.

    forward   y[..., o]  = sum_i x[..., i] W[i, o] + b[o]
    backward  dx[..., i] = sum_o g[..., o] B[i, o]          B fixed and random
              dW[i, o]   = sum_... x[..., i] g[..., o]
              db[o]      = sum_... g[..., o]
    kept      x, W, b and B, as they came

The operation is `alignment.aligned`, of `linear`: its dtypes and its float32 sums are those of
`Linear`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from jax import lax

from flax_customgrad.gradients.feedback.alignment import aligned, checked_inputs
from flax_customgrad.gradients.feedback.feedback_variable import Feedback
from flax_customgrad.layers.drop_in import parameters
from flax_customgrad.layers.linear.linear import Linear, linear
from flax_customgrad.numerics.products import MatmulConfig


class FeedbackLinear(Linear):
    """A linear layer that sends its error back through a fixed random matrix, arXiv:1411.0247.

    Constructor, parameters, initial values and results are those of `Linear`, and so of
    `flax.nnx.Linear`; `feedback` is beside them. Inside `use_autodiff` the backward stays.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        feedback_init: initializer of the feedback matrix; by default that of a kernel, of
            deviation 1 / sqrt(in_features). Its size is that of the errors that it sends back.
        feedback_metadata: metadata of its Variable, such as its sharding.
        rngs: random number generators; the matrix is drawn from `params`, after the parameters.
        **kwargs: further keywords of `flax.nnx.Linear`.

    Attributes:
        feedback: the matrix, a `Feedback` of shape (in_features, out_features) in `param_dtype`.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.FeedbackLinear(3, 4, rngs=nnx.Rngs(0))
        >>> gradient = jax.grad(lambda x: jnp.sum(layer(x)))(jnp.ones((2, 3)))
        >>> bool(jnp.allclose(gradient[0], layer.feedback.sum(axis=1)))
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        feedback_init: nnx.Initializer = default_kernel_init,
        feedback_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        shape = (in_features, out_features)
        drawn = feedback_init(rngs.params(), shape, self.param_dtype)
        self.feedback = Feedback(drawn, **feedback_metadata)

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
        x = checked_inputs(self, inputs, injected)
        how = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return aligned(parameters(self, "kernel", "bias"), self.feedback[...], x, linear, how)
