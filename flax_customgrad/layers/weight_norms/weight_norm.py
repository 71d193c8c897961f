"""WeightNorm: a weight as a direction and a length for each feature.

    forward   v_hat  = v r,  r = 1 / norm(v)     over all axes but the feature axes
              w      = scale v_hat
    backward  sum_gv = sum(g v_hat)
              dscale = sum_gv
              dv     = scale r (g - s v_hat sum_gv)
    kept      v and scale, as they came, and r: one number per feature

As for any vector of length 1, with (i = j) 1 where it holds, else 0, and s = 1:

    ∂r/∂v_i       = -r^3 v_i = -r^2 v_hat_i
    ∂v_hat_j/∂v_i = r ((i = j) - v_hat_j v_hat_i)
    dv_i          = scale sum_j g_j ∂v_hat_j/∂v_i = scale r (g_i - v_hat_i sum_gv)

`r` and its slope `s` are those of `unit_norm`: in float32, not lost to epsilon where v is small,
not overflowing where it is large; `s` is 1 but for v of a norm below 1e-3. nnx computes in the
dtype of v: for a float16 kernel filled with 300 its output and its gradient are 0.

Source: arXiv:1602.07868
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from flax_customgrad.contract.compat import is_traced, overrides_hook, set_class
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import has_custom_backward
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.weight_norms.unit_norm import inverse_norm, slope


@dataclass(frozen=True)
class WeightNormConfig:
    """The choices that are not arrays.

    Attributes:
        axes: the axes that share a norm, and those along which the scale varies.
        epsilon: added to the squared norm; `unit_norm` says how.
        dtype: dtype of the result.
    """

    axes: NormAxes
    epsilon: float
    dtype: Any


class Residuals(NamedTuple):
    """What the backward of `weight_norm` keeps: what the caller holds, and a number per feature."""

    v: jax.Array
    scale: jax.Array | None
    r: jax.Array
    config: WeightNormConfig


@custom_vjp
def weight_norm(v: jax.Array, scale: jax.Array | None, config: WeightNormConfig) -> jax.Array:
    """Gives a weight unit norm for each feature, then a length.

    Args:
        v: the weight, of any shape, float.
        scale: the lengths, shaped like the feature axes of v, float; None for 1.
        config: axes, epsilon and dtype.

    Returns:
        The weight, of v's shape in `config.dtype`.
    """
    return _normalized(v, scale, config)[0]


def _normalized(
    v: jax.Array, scale: jax.Array | None, config: WeightNormConfig
) -> tuple[jax.Array, jax.Array]:
    r = inverse_norm(v, config.axes.reduced, config.epsilon)
    v_hat = v * r
    w = v_hat if scale is None else v_hat * config.axes.along(scale, v.shape)
    return w.astype(config.dtype), r


def _fwd(
    v: jax.Array, scale: jax.Array | None, config: WeightNormConfig
) -> tuple[jax.Array, Residuals]:
    w, r = _normalized(v, scale, config)
    return w, Residuals(v, scale, r, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, jax.Array | None, None]:
    v, scale, r, config = res
    axes = config.axes
    chex.assert_shape(g, v.shape)
    chex.assert_size(r, math.prod(axes.statistic_shape(v.shape)))
    g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    v_hat = v * r
    sum_gv = axes.sum(g * v_hat)
    s = slope(r, config.epsilon)
    dv = r * (g - s * v_hat * axes.spread(sum_gv, v.shape))
    if scale is None:
        return dv, None, None
    chex.assert_shape(scale, tuple(v.shape[i] for i in axes.features))
    return axes.along(scale, v.shape) * dv, sum_gv, None


weight_norm.defvjp(_fwd, _bwd)


_KERNELS = nnx.PathContains("kernel")


class WeightNorm(nnx.WeightNorm):
    """`nnx.WeightNorm` whose scales train, and which is right for tiny and huge weights.

    Constructor, paths, initial values and results are those of `flax.nnx.WeightNorm`; as there, a
    call writes the normalized weights into the wrapped layer. The scales are `nnx.Param`, as in
    current flax; flax 0.12.8 holds bare arrays, which an optimizer of `nnx.Param` never trains.
    `convert` makes Params of them, so convert a model before its optimizer is made.

    Features whose weights have a norm below 1e-3 come out with the norm of their scale, where nnx
    leaves them short of it. Integer and complex weights are left to nnx and to JAX.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> layer = fcg.WeightNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
        >>> layer(jnp.ones((2, 3))).shape
        (2, 4)
        >>> jnp.linalg.norm(layer.layer_instance.kernel[...], axis=0).round(5)
        Array([1., 1., 1., 1.], dtype=float32)

    Source: arXiv:1602.07868
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: int | Sequence[int] | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = nnx.initializers.ones,
        epsilon: float = 1e-12,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        variable_filter: nnx.filterlib.Filter = _KERNELS,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            layer_instance,
            feature_axes=feature_axes,
            use_scale=use_scale,
            scale_init=scale_init,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            variable_filter=variable_filter,
            promote_dtype=promote_dtype,
            rngs=rngs,
        )
        _hold_params(self)

    @classmethod
    def from_layer(cls, layer: nnx.WeightNorm) -> nnx.WeightNorm:
        """Turns a layer of nnx into this one, in place; its scales become Params.

        `layer` itself changes and is returned: pass `nnx.clone(layer)` to keep the original.

        Args:
            layer: a layer of nnx.

        Returns:
            `layer`, which is now of this class.
        """
        set_class(layer, cls)
        _hold_params(layer)
        return layer

    @staticmethod
    def to_layer(layer: nnx.WeightNorm) -> nnx.WeightNorm:
        """Turns a layer of this library into that of nnx, in place, its scales as nnx holds them.

        Args:
            layer: a layer of this library.

        Returns:
            The layer.
        """
        set_class(layer, nnx.WeightNorm)
        if layer.scales is not None and not _nnx_holds_params():
            layer.scales = nnx.data({path: scale[...] for path, scale in layer.scales.items()})
        return layer

    @overrides_hook(nnx.WeightNorm)
    def _weightnorm_inplace(self, path: tuple[Any, ...], param: nnx.Variable) -> None:
        if not self.variable_filter(path, param):
            return
        params = {"v": param[...]}
        if self.scales is not None:
            if path not in self.scales:
                return super()._weightnorm_inplace(path, param)  # which says what is wrong
            params["scale"] = self.scales[path][...]
        if is_traced(self.epsilon) or not has_custom_backward(params["v"], params, self.dtype):
            return super()._weightnorm_inplace(path, param)
        dtype = dtypes.canonicalize_dtype(*params.values(), dtype=self.dtype)
        axes = NormAxes.per_feature(params["v"].ndim, self.feature_axes)
        config = WeightNormConfig(axes, float(self.epsilon), jnp.dtype(dtype))
        param.set_value(weight_norm(params["v"], params.get("scale"), config))


def _hold_params(layer: nnx.WeightNorm) -> None:
    scales = layer.scales or {}
    if not all(isinstance(scale, nnx.Param) for scale in scales.values()):
        layer.scales = nnx.data({path: nnx.Param(scale) for path, scale in scales.items()})


def _nnx_holds_params() -> bool:
    """Whether the scales of `nnx.WeightNorm` are Params, in the flax that is installed."""

    def scales() -> Any:
        return nnx.WeightNorm(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)).scales

    return all(isinstance(scale, nnx.Param) for scale in nnx.eval_shape(scales).values())
