"""GroupNorm: each example normalized over groups of its features, arXiv:1803.08494.

The gradient is that of `normalize`, with statistics per group.
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.layers.normalization.axes import NormAxes, canonical
from flax_customgrad.layers.normalization.norm import Norm, choosing


class GroupNorm(nnx.GroupNorm, Norm):
    """`nnx.GroupNorm` that keeps its input alone, and is right for a large mean and huge values.

    Takes what `flax.nnx.GroupNorm` takes, and `residual`, "input" or "output": what the backward
    keeps. The variance is as exact with `use_fast_variance` as without. Where everything is masked
    the output is the bias and the gradient 0.

    `reduction_axes` may be any axes that include the last. nnx gives each group its own statistics
    only where they are all axes but the first: with others it hands features those of another
    group, or fails.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.GroupNorm(6, num_groups=3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 6))).shape
        (2, 8, 8, 6)
    """

    @choosing(nnx.GroupNorm.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes an input.

        Args:
            x: array of shape (..., num_features).
            mask: binary array, broadcastable to x: where statistics are taken.

        Returns:
            Array of x's shape, in `dtype` or the promoted dtype.

        Raises:
            ValueError: x has another number of features, or `reduction_axes` lack the last axis.
        """
        if not self._ours(x):
            return super().__call__(x, mask=mask)
        last = x.ndim - 1
        reduced = self.reduction_axes
        reduced = (*range(1, last), last) if reduced is None else canonical(x.ndim, reduced)
        if last not in reduced:
            raise ValueError(
                f"reduction_axes={self.reduction_axes} lack the last axis of an input of shape "
                f"{x.shape}, along which the groups are: add -1"
            )
        features = self.num_groups * self.group_size
        if x.shape[-1] != features:
            raise ValueError(
                f"the last axis of an input of shape {x.shape} has {x.shape[-1]} features; "
                f"expected {features}, {self.num_groups} groups of {self.group_size}"
            )
        return self._normalize(x, mask, NormAxes.of(x.ndim, reduced, -1, self.num_groups))[0]
