"""InvertibleBatchNormAct: batch normalization and leaky ReLU that keep their output alone.

    forward   y  = scale x_hat + bias,  scale = |gamma| + epsilon        as `normalize` has it
              z  = y where y >= 0, else slope y
    backward  y  = z where z >= 0, else z / slope
              dy = g where z >= 0, else slope g
              dx, dscale, dbias                       those of `normalize` that keeps y, at dy
    kept      z and the parameters; per feature three numbers

z is the input of the next layer, which a convolution or a Linear keeps anyway, so that the pair
costs nothing. Autodiff keeps two or three arrays of that size. The scale is positive, whatever
`gamma` is, because x_hat is found by dividing by it.

Source: arXiv:1712.02616
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.activation.piecewise import leaky_relu
from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.layers.normalization import normalize as norm
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.batch_norm import BatchNorm
from flax_customgrad.layers.normalization.config import NormConfig
from flax_customgrad.layers.normalization.normalize import Statistics
from flax_customgrad.numerics.argument_checks import check_positive
from flax_customgrad.numerics.dtypes import as_array, is_supported_float


class Residuals(NamedTuple):
    """What the backward keeps: what `normalize` keeps, with z in the place of y, and the slope."""

    of_normalize: norm.Residuals
    slope: float


@custom_vjp(leading_axes=True)
def normalize_and_activate(
    params: Parameters, x: jax.Array, mask: jax.Array | None, config: NormConfig, slope: float
) -> tuple[jax.Array, Statistics]:
    """Normalizes an input, scales and shifts it, and applies a leaky ReLU.

    Args:
        params: `scale`, positive, and `bias`, float, of as many elements as the feature axes have;
            or without.
        x: input of any shape, float.
        mask: bool, broadcastable to x: where statistics are taken; or None.
        config: axes, dtype and the rest; its `residual` is "output".
        slope: that of the leaky ReLU, positive.

    Returns:
        The output, of x's shape in `config.dtype`, and the statistics.
    """
    y, statistics = norm.normalized(params, x, mask, config, False)[0]
    return _leaky(y, slope), statistics


def _fwd(
    params: Parameters, x: jax.Array, mask: jax.Array | None, config: NormConfig, slope: float
) -> tuple[tuple[jax.Array, Statistics], Residuals]:
    (y, statistics), found = norm.normalized(params, x, mask, config, False)
    z = _leaky(y, slope)
    return (z, statistics), Residuals(
        norm.Residuals(params, z, mask, found.standard, found.n, config), slope
    )


def _bwd(
    res: Residuals, cotangents: tuple[jax.Array, Statistics]
) -> tuple[nnx.State, jax.Array, None, None, None]:
    (g, dstatistics), slope = cotangents, res.slope
    # In the dtype of the sums: in half precision a second rounding would cost digits.
    z, g = (a.astype(res.of_normalize.config.sum_dtype) for a in (res.of_normalize.x_or_y, g))
    chex.assert_equal_shape([z, g])
    y = jnp.where(z >= 0, z, z / slope)
    dy = jnp.where(z >= 0, g, slope * g)
    dparams, dx, _, _ = norm.normalize_bwd(res.of_normalize._replace(x_or_y=y), (dy, dstatistics))
    chex.assert_equal_shape([dx, z])
    return dparams, dx, None, None, None


normalize_and_activate.defvjp(_fwd, _bwd)


def _leaky(y: jax.Array, slope: float) -> jax.Array:
    return jnp.where(y >= 0, y, slope * y)


class InvertibleBatchNormAct(BatchNorm):
    """Batch normalization followed by a leaky ReLU, with no input of either kept.

    It stands for an `nnx.BatchNorm` and the activation after it, and has its parameters and
    statistics; but the scale is `abs(gamma) + epsilon`, so that a trained BatchNorm with a negative
    scale computes something else here. The next layer must keep its input, as a Linear or a
    convolution does; and nothing is saved where an addition or another activation comes next.

    In half precision x_hat is found from a rounded output: prefer float32 where the gradient of
    the scale matters.

    Args:
        negative_slope: the slope of the leaky ReLU for negative numbers, positive. The other
            arguments are those of `flax.nnx.BatchNorm`; `epsilon` is added to the variance and to
            the scale, and is positive.

    Raises:
        ValueError: `negative_slope` or `epsilon` is not positive, or `promote_dtype` is not nnx's.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.InvertibleBatchNormAct(1, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[-1.0], [1.0]])).round(2)
        Array([[-0.01],
               [ 1.  ]], dtype=float32)

    Source: arXiv:1712.02616
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        negative_slope: float = 0.01,
    ):
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
            residual="output",
        )
        check_positive("InvertibleBatchNormAct", "epsilon", epsilon)
        slope = check_positive("InvertibleBatchNormAct", "negative_slope", negative_slope)
        self.negative_slope = float(slope)
        if promote_dtype is not dtypes.promote_dtype:
            raise ValueError(
                "InvertibleBatchNormAct promotes as nnx does and cannot call `promote_dtype`: "
                "leave it out"
            )

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes and activates an input, and in training updates the running statistics.

        Args:
            x: float array of any shape; its feature axis has `num_features` elements.
            use_running_average: whether to normalize by the running statistics; None for what the
                constructor was given.
            mask: binary array, broadcastable to x: where statistics are taken.

        Returns:
            Array of x's shape, in `dtype` or the promoted dtype.

        Raises:
            TypeError: x is no real floating array.
            ValueError: nothing says whether to use the running statistics, x lacks the feature
                axis, or it has another size.
        """
        x = as_array(x)
        if not is_supported_float(x):
            raise TypeError(
                "InvertibleBatchNormAct takes float16, bfloat16, float32 and float64, got "
                f"{getattr(x, 'dtype', type(x).__name__)}: cast it first"
            )
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "InvertibleBatchNormAct: use_running_average is None here and in the constructor: "
                "give it, or call model.train() or model.eval()"
            )
        axes = NormAxes.per_feature(x.ndim, self.axis)
        if use_running_average:
            y = self._normalize_by_running_statistics(x, axes)
            return leaky_relu(y, self.negative_slope)
        running = self.mean[...], self.var[...]
        operands = self._operands(x, mask, axes, *running, with_statistics=True)
        z, found = normalize_and_activate(*operands, self.negative_slope)
        self._update_running_statistics(found, is_all=mask is None and x.size > 0)
        return z

    def _scale_and_bias(self) -> Parameters:
        params = super()._scale_and_bias()
        if "scale" not in params:
            return params
        gamma = params["scale"]
        # Not abs, whose derivative at 0 would hold gamma there.
        positive = jnp.where(gamma < 0, -gamma, gamma) + self.epsilon
        return nnx.State({**params, "scale": positive})
