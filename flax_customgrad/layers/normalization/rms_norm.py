"""RMSNorm: each example divided by the root mean square of its features.

    forward   x_hat = x rstd,  rstd = 1 / sqrt(mean(x^2) + epsilon)
              y     = scale x_hat
    backward  h     = scale g
              dx    = rstd (h - x_hat mean(h x_hat))
              dscale = sum(g x_hat)                       over all axes but the feature axes
    kept      x, or y, and the scale; a number per example

That is the operation `normalize` without a mean, its means over `reduction_axes`.

Source: arXiv:1910.07467
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
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.config import NormResidual
from flax_customgrad.layers.normalization.norm import Norm
from flax_customgrad.numerics.dtypes import as_array


class RMSNorm(nnx.RMSNorm, Norm):
    """`nnx.RMSNorm` that keeps its input alone, and is right for huge values.

    Takes what `flax.nnx.RMSNorm` takes, and `residual`. Where everything is masked the output and
    the gradient are 0. The output alone of 4096 rows and more is computed on one CPU as XLA fuses
    it best: there rows are NaN whose squares overflow (1e19).

    Args:
        residual: what the backward keeps, "input" or "output". The output costs nothing where the
            next layer keeps it anyway, as a Linear does, but needs a scale without zeros.

    Raises:
        ValueError: `residual` is neither, or it is "output" and an element of the scale is 0.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.RMSNorm(2, rngs=nnx.Rngs(0))
        >>> [f"{value:.3f}" for value in layer(jnp.array([3e20, 4e20]))]
        ['0.849', '1.131']

    Source: arXiv:1910.07467
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = nnx.initializers.ones,
        reduction_axes: int | Sequence[int] = -1,
        feature_axes: int | Sequence[int] = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        residual: NormResidual = "input",
    ):
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_scale=use_scale,
            scale_init=scale_init,
            reduction_axes=reduction_axes,
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            scale_metadata=scale_metadata,
        )
        self._set_residual(residual)

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
        inputs, x = x, as_array(x)
        if not self._has_custom_backward(x):
            return super().__call__(inputs, **given(mask=mask))
        axes = NormAxes.of(x.ndim, self.reduction_axes, self.feature_axes)
        return self._normalize(x, mask, axes, centered=False)[0]
