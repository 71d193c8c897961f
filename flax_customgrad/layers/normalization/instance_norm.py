"""InstanceNorm: each channel of each example normalized on its own, arXiv:1607.08022.

The gradient is that of `normalize`, with statistics over all axes but the first and the features.
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.layers.normalization.axes import NormAxes, canonical
from flax_customgrad.layers.normalization.norm import Norm, choosing


class InstanceNorm(nnx.InstanceNorm, Norm):
    """`nnx.InstanceNorm` that keeps its input alone, and is right for a large mean and huge values.

    Takes what `flax.nnx.InstanceNorm` takes, and `residual`, "input" or "output": what the backward
    keeps. The variance is as exact with `use_fast_variance` as without. Where everything is masked
    the output is the bias and the gradient 0.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.InstanceNorm(3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 3))).shape
        (2, 8, 8, 3)
    """

    @choosing(nnx.InstanceNorm.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes an input.

        Args:
            x: array of shape (batch, ...); its feature axes have `num_features` elements.
            mask: binary array, broadcastable to x: where statistics are taken.

        Returns:
            Array of x's shape, in `dtype` or the promoted dtype.

        Raises:
            ValueError: x lacks an axis, the first axis is a feature axis, or the feature axes have
                another size.
        """
        if not self._ours(x):
            return super().__call__(x, mask=mask)
        features = canonical(x.ndim, self.feature_axes)
        if 0 in features:
            raise ValueError(
                "The channel axes cannot include the leading dimension as this is assumed to be "
                "the batch axis."
            )
        reduced = [axis for axis in range(1, x.ndim) if axis not in features]
        return self._normalize(x, mask, NormAxes.of(x.ndim, reduced, features))[0]
