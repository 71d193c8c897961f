"""GroupNorm: each example normalized over groups of its features.

    forward   x_hat = (x - mean) rstd,  rstd = 1 / sqrt(variance + epsilon)
              y     = scale x_hat + bias
    backward  h     = scale g
              dx    = rstd (h - mean(h) - x_hat mean(h x_hat))
              dscale = sum(g x_hat),  dbias = sum(g)      over all axes but the last
    kept      x, or y, and the parameters; three numbers per example and group

That is the operation `normalize`, with means over `reduction_axes`, by group along the last.

Source: arXiv:1803.08494
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from flax_customgrad.layers.drop_in import given
from flax_customgrad.layers.normalization.axes import NormAxes, canonical
from flax_customgrad.layers.normalization.config import NormResidual
from flax_customgrad.layers.normalization.norm import Norm
from flax_customgrad.numerics.dtypes import as_array


class GroupNorm(nnx.GroupNorm, Norm):
    """`nnx.GroupNorm` that keeps its input alone, and is right for a large mean and huge values.

    Takes what `flax.nnx.GroupNorm` takes, and `residual`. The variance is as exact with
    `use_fast_variance` as without. Where everything is masked the output is the bias and the
    gradient 0.

    `reduction_axes` may be any axes that include the last. nnx gives each group its own statistics
    only where they are all axes but the first: with others it hands features those of another
    group, or fails.

    Args:
        residual: what the backward keeps, "input" or "output". The output costs nothing where the
            next layer keeps it anyway, as a Linear does, but needs a scale without zeros.

    Raises:
        ValueError: `residual` is neither, or it is "output" and an element of the scale is 0.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.GroupNorm(6, num_groups=3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 6))).shape
        (2, 8, 8, 6)

    Source: arXiv:1803.08494
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        reduction_axes: int | Sequence[int] | None = None,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        residual: NormResidual = "input",
    ):
        super().__init__(
            num_features,
            num_groups,
            group_size,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            reduction_axes=reduction_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self._set_residual(residual)

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
        inputs, x = x, as_array(x)
        if not self._has_custom_backward(x):
            return super().__call__(inputs, **given(mask=mask))
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
