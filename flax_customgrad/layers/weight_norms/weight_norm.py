"""WeightNorm: a weight as a direction and a length for each feature, arXiv:1602.07868.

    forward   v^ = v r,  r = 1 / norm(v)     over all axes but the feature axes
              w  = scale v^
    backward  dscale = sum(g v^)
              dv     = scale r (g - s v^ sum(g v^))
    kept      v and scale, as they came, and r: one number per feature

r and s are those of `unit_norm`: in float32, not lost to epsilon where v is small, not overflowing
where it is large; s is 1 but for v of a norm below 1e-3. nnx computes in the dtype of v: for a
float16 kernel filled with 300 its output and its gradient are 0.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from flax_customgrad.contract.compat import set_class
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import has_custom_backward
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.weight_norms.unit_norm import inverse_norm, slope
from flax_customgrad.numerics.accumulation import accumulator


@dataclass(frozen=True)
class WeightNormConfig:
    """The choices that are not arrays.

    Attributes:
        axes: what shares a norm, and along what the scale varies.
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
    how: WeightNormConfig


@custom_vjp
def weight_norm(v: jax.Array, scale: jax.Array | None, how: WeightNormConfig) -> jax.Array:
    """Gives a weight unit norm for each feature, then a length.

    Args:
        v: the weight, of any shape, float.
        scale: the lengths, shaped like the feature axes of v, float; None for 1.
        how: axes, epsilon and dtype.

    Returns:
        The weight, of v's shape in `how.dtype`.
    """
    return _normalized(v, scale, how)[0]


def _normalized(
    v: jax.Array, scale: jax.Array | None, how: WeightNormConfig
) -> tuple[jax.Array, jax.Array]:
    r = inverse_norm(v, how.axes.reduced, how.epsilon)
    unit = v * r
    w = unit if scale is None else unit * how.axes.along(scale, v.shape)
    return w.astype(how.dtype), r


def _fwd(
    v: jax.Array, scale: jax.Array | None, how: WeightNormConfig
) -> tuple[jax.Array, Residuals]:
    w, r = _normalized(v, scale, how)
    return w, Residuals(v, scale, r, how)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, jax.Array | None, None]:
    v, scale, r, how = res
    g = g.astype(accumulator(g))
    unit = v * r
    along = how.axes.sum(g * unit)
    chex.assert_equal_shape([along, r])
    tangential = r * (g - slope(r, how.epsilon) * unit * along)
    if scale is None:
        return tangential, None, None
    dscale = how.axes.of_parameter(along, scale)
    return how.axes.along(scale, v.shape) * tangential, dscale, None


weight_norm.defvjp(_fwd, _bwd)


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
    """

    @functools.wraps(nnx.WeightNorm.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        _hold_params(self)

    @classmethod
    def from_layer(cls, layer: nnx.WeightNorm) -> nnx.WeightNorm:
        """The layer itself, become this one; its scales become Params.

        Args:
            layer: a layer of nnx.
        """
        set_class(layer, cls)
        _hold_params(layer)
        return layer

    @staticmethod
    def to_layer(layer: nnx.WeightNorm) -> nnx.WeightNorm:
        """The layer itself, become that of nnx; its scales become what nnx holds.

        Args:
            layer: a layer of this library.
        """
        set_class(layer, nnx.WeightNorm)
        if layer.scales is not None and not _nnx_holds_params():
            layer.scales = nnx.data({path: scale[...] for path, scale in layer.scales.items()})
        return layer

    def _weightnorm_inplace(self, path: tuple[Any, ...], param: nnx.Variable) -> None:
        if not self.variable_filter(path, param):
            return
        params = {"v": param[...]}
        if self.scales is not None:
            if path not in self.scales:
                return super()._weightnorm_inplace(path, param)  # which says what is wrong
            params["scale"] = self.scales[path][...]
        if not has_custom_backward(params["v"], params):
            return super()._weightnorm_inplace(path, param)
        dtype = dtypes.canonicalize_dtype(*params.values(), dtype=self.dtype)
        axes = NormAxes.per_feature(params["v"].ndim, self.feature_axes)
        how = WeightNormConfig(axes, float(self.epsilon), jnp.dtype(dtype))
        param.set_value(weight_norm(params["v"], params.get("scale"), how))


def _hold_params(layer: nnx.WeightNorm) -> None:
    scales = layer.scales or {}
    if not all(isinstance(scale, nnx.Param) for scale in scales.values()):
        layer.scales = nnx.data({path: nnx.Param(scale) for path, scale in scales.items()})


def _nnx_holds_params() -> bool:
    """Whether the scales of `nnx.WeightNorm` are Params, in the flax that is installed."""

    def scales() -> Any:
        return nnx.WeightNorm(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)).scales

    return all(isinstance(scale, nnx.Param) for scale in nnx.eval_shape(scales).values())
