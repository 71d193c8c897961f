"""LayerNorm: each example normalized over its features, arXiv:1607.06450.

The gradient is that of `normalize`, with statistics over `reduction_axes`.
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.norm import Norm, choosing


class LayerNorm(nnx.LayerNorm, Norm):
    """`nnx.LayerNorm` that keeps its input alone, and is right for a large mean and huge values.

    Takes what `flax.nnx.LayerNorm` takes, and `residual`, "input" or "output": what the backward
    keeps. The variance is as exact with `use_fast_variance` as without. Where everything is masked
    the output is the bias and the gradient 0.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.LayerNorm(4, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([10001.0, 10002.0, 10003.0, 10004.0]))
        >>> [f"{value:.3f}" for value in y]
        ['-1.342', '-0.447', '0.447', '1.342']
    """

    @choosing(nnx.LayerNorm.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes an input.

        Args:
            x: array of any shape; its feature axes have `num_features` elements.
            mask: binary array, broadcastable to x: where statistics are taken.

        Returns:
            Array of x's shape, in `dtype` or the promoted dtype.

        Raises:
            ValueError: x lacks an axis, or its feature axes have another size.
        """
        if not self._ours(x):
            return super().__call__(x, mask=mask)
        axes = NormAxes.of(x.ndim, self.reduction_axes, self.feature_axes)
        return self._normalize(x, mask, axes)[0]
