"""BatchNorm: each feature normalized over the batch.

In training the gradient is that of `normalize`, with means over all axes but that of the features.
The running statistics are updated outside of it, from the statistics that it returns. In evaluation
they are constants to normalize by, in the operation `normalize_by`:

    forward   x_hat  = (x - mean) rstd,  rstd = 1 / sqrt(var + epsilon)
              y      = scale x_hat + bias
    backward  sum_g  = sum(g),  sum_gx = sum(g x_hat)      over all axes but that of the features
              dx     = rstd scale g
              dscale = sum_gx,  dbias = sum_g
              dmean  = -rstd scale sum_g,  dvar = -rstd^2 scale sum_gx / 2
    kept      x and the parameters, as they came

Source: arXiv:1502.03167
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters, given, parameters
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.config import NormConfig, NormResidual
from flax_customgrad.layers.normalization.norm import Norm
from flax_customgrad.layers.normalization.normalize import Statistics
from flax_customgrad.numerics.dtypes import as_array


class Residuals(NamedTuple):
    """What the backward of `normalize_by` keeps: only what the caller holds anyway."""

    params: Parameters
    x: jax.Array
    config: NormConfig


@custom_vjp(leading_axes=True)
def normalize_by(params: Parameters, x: jax.Array, config: NormConfig) -> jax.Array:
    """Normalizes an input by given statistics, then scales and shifts it.

    Args:
        params: `mean` and `var`, and `scale` and `bias` or without, float, each of as many elements
            as the feature axes have.
        x: input of any shape, float.
        config: axes, epsilon and dtype.

    Returns:
        Array of x's shape in `config.dtype`.
    """
    return config.axes.scaled_and_shifted(_x_hat(params, x, config), params).astype(config.dtype)


def _fwd(params: Parameters, x: jax.Array, config: NormConfig) -> tuple[jax.Array, Residuals]:
    return normalize_by(params, x, config), Residuals(params, x, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None]:
    params, x, config = res
    axes = config.axes
    F = math.prod(x.shape[i] for i in axes.features)
    chex.assert_shape(g, x.shape)
    chex.assert_size(list(params.values()), F)

    x_hat = _x_hat(params, x, config)
    g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    rest = [i for i in range(g.ndim) if i - g.ndim not in axes.features]
    sum_g, sum_gx = (lax.reduce_sum(a, rest).reshape(F) for a in (g, g * x_hat))

    rstd = _rstd(params, x, config.epsilon).reshape(F)
    rstd_scale = rstd * params["scale"].reshape(F) if "scale" in params else rstd
    grads = {
        "mean": -rstd_scale * sum_g,
        "var": -rstd_scale * rstd * sum_gx / 2,
        "scale": sum_gx,
        "bias": sum_g,
    }
    grads = nnx.State({name: grads[name].reshape(p.shape) for name, p in params.items()})
    chex.assert_trees_all_equal_shapes(grads, nnx.State(dict(params)))
    dx = axes.along(rstd_scale, x.shape) * g
    return grads, dx, None


normalize_by.defvjp(_fwd, _bwd)


@jax.jit
def _mixed(old: jax.Array, new: jax.Array, of_old: Any, of_new: Any) -> jax.Array:
    return of_old * old + of_new * new


def _rstd(params: Parameters, x: jax.Array, epsilon: float) -> jax.Array:
    wide = jnp.result_type(jnp.float32, x, *params.values())
    return lax.rsqrt(params["var"].astype(wide) + epsilon)


def _x_hat(params: Parameters, x: jax.Array, config: NormConfig) -> jax.Array:
    """The normalized input, in float32 or wider."""
    rstd = _rstd(params, x, config.epsilon)
    mean, rstd = (config.axes.along(a, x.shape) for a in (params["mean"], rstd))
    return (x - mean) * rstd


class BatchNorm(nnx.BatchNorm, Norm):
    """`nnx.BatchNorm` that keeps its input alone, and is right for a large mean and huge values.

    Takes what `flax.nnx.BatchNorm` takes, and `residual`. The variance is as exact with
    `use_fast_variance` as without. A batch that is empty or masked altogether leaves the running
    statistics alone; its output is the bias, its gradient 0.

    With `axis_name` the devices share their statistics, each with the weight of the elements that
    it has: the result is that of one device with the whole batch. (nnx weighs a device with a mask
    like one without.)

    Without `axis_name`, where a mesh splits the batch under `jax.jit`, the statistics are those of
    the whole batch too. A step then takes three collectives, because the mean, one number for each
    feature, is exchanged before the squares about it. nnx takes two, and four with
    `use_fast_variance=False`. Inside of `jax.shard_map`, with `axis_name`, both take two.

    Args:
        residual: what the backward keeps, "input" or "output". The output costs nothing where the
            next layer keeps it anyway, as a Linear does, but needs a scale without zeros.

    Raises:
        ValueError: `residual` is neither, or it is "output" and an element of the scale is 0.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
        >>> layer.mean[...]
        Array([ 1., 10.], dtype=float32)

    Source: arXiv:1502.03167
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
        residual: NormResidual = "input",
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
        )
        self._set_residual(residual)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes an input, and in training updates the running statistics.

        Args:
            x: array of any shape; its feature axis has `num_features` elements.
            use_running_average: whether to normalize by the running statistics; None for what the
                constructor was given.
            mask: binary array, broadcastable to x: where statistics are taken.

        Returns:
            Array of x's shape, in `dtype` or the promoted dtype.

        Raises:
            ValueError: nothing says whether to use the running statistics, x lacks the feature
                axis, or it has another size.
        """
        inputs, asked, x = x, use_running_average, as_array(x)
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None or not self._has_custom_backward(x):
            arguments = given(use_running_average=asked, mask=mask)
            return super().__call__(inputs, **arguments)
        axes = NormAxes.per_feature(x.ndim, self.axis)
        if use_running_average:
            return self._normalize_by_running_statistics(x, axes)
        running = self.mean[...], self.var[...]
        y, found = self._normalize(x, mask, axes, *running, with_statistics=True)
        assert found is not None
        self._update_running_statistics(found, is_all=mask is None and x.size > 0)
        return y

    def _normalize_by_running_statistics(self, x: jax.Array, axes: NormAxes) -> jax.Array:
        params = nnx.State({**self._scale_and_bias(), **parameters(self, "mean", "var")})
        dtype = dtypes.canonicalize_dtype(x, *params.values(), dtype=self.dtype)
        return normalize_by(params, x, NormConfig(axes, float(self.epsilon), dtype))

    def _update_running_statistics(self, found: Statistics, is_all: bool) -> None:
        """Mixes in those of a batch, unless it has no element that counts.

        Args:
            found: the statistics of the batch.
            is_all: whether the batch has elements, which all count.
        """
        for variable, new in ((self.mean, found.mean), (self.var, found.variance)):
            old = variable[...]
            mixed = _mixed(old, new.reshape(old.shape), self.momentum, 1 - self.momentum)
            if not is_all:
                mixed = jnp.where(found.n.reshape(-1) > 0, mixed, old)
            variable[...] = lax.stop_gradient(mixed.astype(old.dtype))
