"""FeedbackConv: a convolution with feedback alignment.

    forward   y  = conv(x, W) + b
    backward  dx = the gradient of conv(x, B) for x          B fixed and random
              dW = that of conv(x, W) for W
              db = the sum of g over images and space
    kept      x, W, b and B, as they came

`convolution` writes them out. The operation is `alignment.aligned`, of `convolution`: its lowerings
and its float32 sums are those of `Conv`.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from jax import lax

from flax_customgrad.gradients.feedback.alignment import aligned, checked_inputs
from flax_customgrad.gradients.feedback.feedback_variable import Feedback
from flax_customgrad.layers.conv.conv import Conv
from flax_customgrad.layers.conv.convolution import convolution
from flax_customgrad.layers.conv.images import check_images, in_one_batch, parameters_with_mask


class FeedbackConv(Conv):
    """A convolution that sends its error back through a fixed random kernel, arXiv:1411.0247.

    Constructor, parameters, initial values and results are those of `Conv`, and so of
    `flax.nnx.Conv`; `feedback` is beside them. A mask on the kernel holds for the feedback as well:
    what is not connected sends nothing back. Inside `use_autodiff` the backward stays.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        kernel_size: shape of the window, an int for one axis of space.
        *args: further arguments of `flax.nnx.Conv`.
        feedback_init: initializer of the feedback kernel; by default that of a kernel.
        feedback_metadata: metadata of its Variable, such as its sharding.
        rngs: random number generators; the feedback is drawn from `params`, after the parameters.
        **kwargs: further keywords of `flax.nnx.Conv`.

    Attributes:
        feedback: the kernel of the backward, a `Feedback` of the shape of `kernel`, in
            `param_dtype`.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.FeedbackConv(3, 4, (3, 3), strides=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 3))).shape
        (2, 4, 4, 4)
        >>> layer.feedback.shape
        (3, 3, 3, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *args: Any,
        feedback_init: nnx.Initializer = default_kernel_init,
        feedback_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, kernel_size, *args, rngs=rngs, **kwargs)
        drawn = feedback_init(rngs.params(), self.kernel_shape, self.param_dtype)
        self.feedback = Feedback(drawn, **feedback_metadata)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (*batch, *size, in_features), with any number of batch axes.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (*batch, *out, out_features), in `dtype` or the promoted dtype.

        Raises:
            ValueError: the layer has a `conv_general_dilated` or `promote_dtype` of the user's own,
                or `Conv` would raise it.
            TypeError: the inputs are integers or complex.
        """
        injected = (
            self.conv_general_dilated is not lax.conv_general_dilated
            or self.promote_dtype is not dtypes.promote_dtype
        )
        images = checked_inputs(self, inputs, injected)
        check_images(self, images, self.in_features)
        params, feedback = parameters_with_mask(self), self.feedback[...]
        if self.mask is not None:
            feedback *= self.mask
        how = self._how(images, out_sharding)

        def run(x: jax.Array) -> jax.Array:
            return aligned(params, feedback, x, convolution, how)

        return in_one_batch(run, images, len(self.kernel_size))
