"""`Feedback`: the Variable of what is fixed and random in a backward."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer

from flax_customgrad.layers.stacked import stack_axes


class Feedback(nnx.Variable):
    """A fixed random matrix through which errors are sent back.

    It is no `nnx.Param`: `nnx.grad` and `nnx.Optimizer` leave it alone, and a checkpoint has it.

    Example:
        >>> import flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.FeedbackLinear(3, 4, rngs=nnx.Rngs(0))
        >>> list(nnx.state(layer, fcg.Feedback))
        ['feedback']
    """


def random_feedback(
    layer: Any, rngs: nnx.Rngs, init: Initializer, metadata: Mapping[str, Any]
) -> Feedback:
    """Feedback for a layer, or for each of a stack: an array like its kernel.

    Args:
        layer: the layer; its kernel is float of any shape.
        rngs: random number generators; it is drawn from `params`.
        init: an initializer of a kernel.
        metadata: the metadata of the Variable.
    """
    axes, kernel = stack_axes(layer), layer.kernel
    shape = kernel.shape[len(axes) :]
    drawn = [init(rngs.params(), shape, kernel.dtype) for _ in range(math.prod(axes))]
    return Feedback(jnp.stack(drawn).reshape(kernel.shape), **metadata)
