"""BatchNorm: each feature normalized over the batch, arXiv:1502.03167.

In training the gradient is that of `normalize`. The running statistics are updated outside of it,
from the statistics that it returns. In evaluation they are constants to normalize by:

    forward   x^ = (x - mean) r,  r = 1 / sqrt(var + epsilon),  y = scale x^ + bias
    backward  dx = r scale g,  dscale = sum(g x^),  dbias = sum(g)
              dmean = -r scale sum(g),  dvar = -r^2 scale sum(g x^) / 2
    kept      x and the parameters
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters, parameters
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.norm import Norm, choosing
from flax_customgrad.numerics.accumulation import accumulator


class Residuals(NamedTuple):
    """What the backward of `normalize_by` keeps: only what the caller holds anyway."""

    params: Parameters
    x: jax.Array
    axes: NormAxes
    epsilon: float


@custom_vjp
def normalize_by(
    params: Parameters, x: jax.Array, axes: NormAxes, epsilon: float, dtype: Any
) -> jax.Array:
    """Normalizes an input by given statistics, then scales and shifts it.

    Args:
        params: `mean` and `var`, and `scale` and `bias` or without, float, each of as many elements
            as the feature axes have.
        x: input of any shape, float.
        axes: the feature axes, and as reduced ones the others.
        epsilon: added to `var`.
        dtype: dtype of the output.

    Returns:
        Array of x's shape in `dtype`.
    """
    y = _standardized(params, x, axes, epsilon)
    if "scale" in params:
        y = y * axes.along(params["scale"], x.shape)
    if "bias" in params:
        y = y + axes.along(params["bias"], x.shape)
    return y.astype(dtype)


def _fwd(
    params: Parameters, x: jax.Array, axes: NormAxes, epsilon: float, dtype: Any
) -> tuple[jax.Array, Residuals]:
    return normalize_by(params, x, axes, epsilon, dtype), Residuals(params, x, axes, epsilon)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None, None, None]:
    params, x, axes = res.params, res.x, res.axes
    shape = params["mean"].shape
    g = g.astype(accumulator(g))
    sum_g = lax.reduce_sum(g, axes.reduced).reshape(shape)
    gx = g * _standardized(params, x, axes, res.epsilon)
    sum_gx = lax.reduce_sum(gx, axes.reduced).reshape(shape)
    chex.assert_equal_shape([sum_g, sum_gx, params["mean"], params["var"]])

    r = _rstd(params, x, res.epsilon)
    r_scale = r * params["scale"] if "scale" in params else r
    grads = {
        "mean": -r_scale * sum_g,
        "var": -r_scale * r * sum_gx / 2,
        "scale": sum_gx,
        "bias": sum_g,
    }
    dx = g * axes.along(r_scale, x.shape)
    return nnx.State({name: grads[name] for name in params}), dx, None, None, None


normalize_by.defvjp(_fwd, _bwd)


def _rstd(params: Parameters, x: jax.Array, epsilon: float) -> jax.Array:
    return lax.rsqrt(params["var"].astype(accumulator(x, *params.values())) + epsilon)


def _standardized(params: Parameters, x: jax.Array, axes: NormAxes, epsilon: float) -> jax.Array:
    """x^, in float32 or wider."""
    mean, r = (axes.along(a, x.shape) for a in (params["mean"], _rstd(params, x, epsilon)))
    return (x - mean) * r


class BatchNorm(nnx.BatchNorm, Norm):
    """`nnx.BatchNorm` that keeps its input alone, and is right for a large mean and huge values.

    Takes what `flax.nnx.BatchNorm` takes, and `residual`, "input" or "output": what the backward
    keeps. The variance is as exact with `use_fast_variance` as without. A batch that is empty or
    masked altogether leaves the running statistics alone; its output is the bias, its gradient 0.

    With `axis_name` the devices share their statistics, each with the weight of the elements that
    it has: the result is that of one device with the whole batch. (nnx weighs a device with a mask
    like one without.)

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
        >>> layer.mean[...]
        Array([ 1., 10.], dtype=float32)
    """

    @choosing(nnx.BatchNorm.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

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
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None or not self._ours(x):
            return super().__call__(x, use_running_average, mask=mask)
        axes = NormAxes.per_feature(x.ndim, self.axis)
        stored = parameters(self, "mean", "var")
        if use_running_average:
            params = nnx.State({**self._parameters(), **stored})
            dtype = dtypes.canonicalize_dtype(x, *params.values(), dtype=self.dtype)
            return normalize_by(params, x, axes, float(self.epsilon), dtype)

        y, found = self._normalize(x, mask, axes, *stored.values())
        for variable, new in ((self.mean, found.mean), (self.var, found.variance)):
            old = variable[...]
            mixed = self.momentum * old + (1 - self.momentum) * new.reshape(old.shape)
            if mask is not None or x.size == 0:
                mixed = jnp.where(found.n.reshape(-1) > 0, mixed, old)
            variable[...] = lax.stop_gradient(mixed.astype(old.dtype))
        return y
