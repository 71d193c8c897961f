"""InstanceNorm: each channel of each example normalized on its own.

    forward   x_hat = (x - mean) rstd,  rstd = 1 / sqrt(variance + epsilon)
              y     = scale x_hat + bias
    backward  h     = scale g
              dx    = rstd (h - mean(h) - x_hat mean(h x_hat))
              dscale = sum(g x_hat),  dbias = sum(g)      over all axes but the feature axes
    kept      x, or y, and the parameters; three numbers per example and channel

That is the operation `normalize`, with means over all axes but the first and the feature axes.

Source: arXiv:1607.08022
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


class InstanceNorm(nnx.InstanceNorm, Norm):
    """`nnx.InstanceNorm` that keeps its input alone, and is right for a large mean and huge values.

    Takes what `flax.nnx.InstanceNorm` takes, and `residual`. The variance is as exact with
    `use_fast_variance` as without. Where everything is masked the output is the bias and the
    gradient 0.

    Args:
        residual: what the backward keeps, "input" or "output". The output costs nothing where the
            next layer keeps it anyway, as a Linear does, but needs a scale without zeros.

    Raises:
        ValueError: `residual` is neither, or it is "output" and an element of the scale is 0.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.InstanceNorm(3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 3))).shape
        (2, 8, 8, 3)

    Source: arXiv:1607.08022
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        feature_axes: int | Sequence[int] = -1,
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
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            feature_axes=feature_axes,
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
            x: array of shape (batch, ...); its feature axes have `num_features` elements.
            mask: binary array, broadcastable to x: where statistics are taken.

        Returns:
            Array of x's shape, in `dtype` or the promoted dtype.

        Raises:
            ValueError: x lacks an axis, the first axis is a feature axis, or the feature axes have
                another size.
        """
        inputs, x = x, as_array(x)
        if not self._has_custom_backward(x):
            return super().__call__(inputs, **given(mask=mask))
        features = canonical(x.ndim, self.feature_axes)
        if 0 in features:
            raise ValueError(
                "The channel axes cannot include the leading dimension as this is assumed to be "
                "the batch axis."
            )
        reduced = [axis for axis in range(1, x.ndim) if axis not in features]
        return self._normalize(x, mask, NormAxes.of(x.ndim, reduced, features))[0]
