"""RMSNorm: divided by the root mean square, without a mean, arXiv:1910.07467.

The gradient is that of `normalize` without the terms of the mean.
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.norm import Norm, choosing


class RMSNorm(nnx.RMSNorm, Norm):
    """`nnx.RMSNorm` that keeps its input alone, and is right for huge values.

    Takes what `flax.nnx.RMSNorm` takes, and `residual`, "input" or "output": what the backward
    keeps. Where everything is masked the output and the gradient are 0.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.RMSNorm(2, rngs=nnx.Rngs(0))
        >>> [f"{value:.3f}" for value in layer(jnp.array([3e20, 4e20]))]
        ['0.849', '1.131']
    """

    @choosing(nnx.RMSNorm.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes an input.

        Args:
            x: array of any shape; its feature axes have `num_features` elements.
            mask: binary array, broadcastable to x: where the mean square is taken.

        Returns:
            Array of x's shape, in `dtype` or the promoted dtype.

        Raises:
            ValueError: x lacks an axis, or its feature axes have another size.
        """
        if not self._ours(x):
            return super().__call__(x, mask)
        axes = NormAxes.of(x.ndim, self.reduction_axes, self.feature_axes)
        return self._normalize(x, mask, axes, centered=False)[0]
