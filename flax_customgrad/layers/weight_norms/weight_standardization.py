"""WeightStandardization: a weight of mean 0 and variance 1 for each feature.

    forward   v_hat  = (v - mean) rstd,  rstd = 1 / sqrt(variance + epsilon)
              w      = scale v_hat
    backward  h      = scale g
              dv     = rstd (h - mean(h) - v_hat mean(h v_hat))
              dscale = sum(g v_hat)                    all over all axes but the feature axes
    kept      v and scale, as they came, and three numbers per feature

That is the operation `normalize`, by weights in the place of activations, with a mean that is
corrected for its own rounding: a kernel about 1e4 with a spread of 1 is right to 1e-6.

Source: arXiv:1903.10520
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from flax_customgrad.layers.drop_in import has_custom_backward
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.config import NormConfig
from flax_customgrad.layers.normalization.normalize import normalize
from flax_customgrad.numerics.accumulation import accumulator

_KERNELS = nnx.PathContains("kernel")


class WeightStandardization(nnx.Module):
    """Wraps a layer, whose weights are standardized before each call, as `nnx.WeightNorm` does.

    The weights that train are the ones before standardization: unlike with `WeightNorm`, a call
    leaves them in the wrapped layer. With `use_scale` each feature has a gain, as in the scaled
    form of arXiv:2101.08692; for the N weights that share a feature, `scale_init=constant(N**-0.5)`
    keeps the variance of activations.

    Attributes:
        layer_instance: the wrapped layer.
        scales: the gains, an `nnx.Param` by the path of each weight; None without `use_scale`.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> conv = nnx.Conv(3, 8, kernel_size=(3, 3), rngs=rngs)
        >>> layer = fcg.WeightStandardization(conv, rngs=rngs)
        >>> layer(jnp.ones((2, 4, 4, 3))).shape
        (2, 4, 4, 8)

    Source: arXiv:1903.10520
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: Any = -1,
        use_scale: bool = False,
        scale_init: jax.nn.initializers.Initializer = nnx.initializers.ones,
        epsilon: float = 1e-10,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        variable_filter: nnx.filterlib.Filter = _KERNELS,
        rngs: nnx.Rngs,
    ):
        """Wraps a layer.

        Args:
            layer_instance: a Module that is called with one array, and with whatever else.
            feature_axes: the axes along which each slice of a weight is standardized on its own,
                one or several; None standardizes each weight as a whole.
            use_scale: whether the standardized weights are multiplied by gains.
            scale_init: initializer of the gains, of the shape of the feature axes.
            epsilon: added to the variance. 1e-10 is the 1e-5 that the paper's code adds to the
                standard deviation. In float16 it should be larger where a weight may be constant,
                whose gradient is multiplied by 1 / sqrt(epsilon).
            dtype: dtype of the standardized weights; by default that of the weights and gains.
            param_dtype: dtype of the gains.
            variable_filter: which of the layer's `nnx.Param` are weights.
            rngs: its stream `params` seeds the gains.

        Raises:
            ValueError: the filter selects no parameter, or a weight lacks a feature axis.
            TypeError: a selected parameter is not real and floating.
        """
        self.layer_instance = layer_instance
        self.feature_axes = () if feature_axes is None else feature_axes
        self.epsilon = float(epsilon)
        self.dtype = dtype
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        self.scales: dict[Any, nnx.Param] | None = None
        weights = list(self._weights())
        if not weights:
            paths = [_path_string(path) for path, _ in _parameters(layer_instance)]
            raise ValueError(
                f"variable_filter selects no parameter of {type(layer_instance).__name__}; there "
                f"are {', '.join(paths) or 'none'}"
            )
        gains = {}
        for path, weight in weights:
            if not jnp.issubdtype(weight.dtype, jnp.floating):
                raise TypeError(
                    f"{_path_string(path)} is {weight.dtype}: expected a floating dtype"
                )
            features = NormAxes.per_feature(weight.ndim, self.feature_axes).features
            if use_scale:
                shape = tuple(weight.shape[i] for i in features)
                gains[path] = nnx.Param(scale_init(rngs.params(), shape, param_dtype))
        if use_scale:
            self.scales = nnx.data(gains)

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Calls the wrapped layer with standardized weights.

        Args:
            x: what the layer takes.
            *args: what else it takes.
            **kwargs: what else it takes.

        Returns:
            What the layer returns.

        Raises:
            ValueError: the layer has got another weight since it was wrapped, for which there is
                no gain.
        """
        weights = [
            (weight, weight[...], self._standardized(path, weight[...]))
            for path, weight in self._weights()
        ]
        try:
            for weight, _, standardized in weights:
                weight.set_value(standardized)
            return self.layer_instance(x, *args, **kwargs)
        finally:
            for weight, trained, _ in weights:
                weight.set_value(trained)

    def _standardized(self, path: tuple[Any, ...], v: jax.Array) -> jax.Array:
        params: dict[str, jax.Array] = {}
        if self.scales is not None:
            if path not in self.scales:
                raise ValueError(
                    f"there is no gain for {_path_string(path)}: wrap the layer again after "
                    "changing it"
                )
            params["scale"] = self.scales[path][...]
        axes = NormAxes.per_feature(v.ndim, self.feature_axes)
        dtype = dtypes.canonicalize_dtype(v, *params.values(), dtype=self.dtype)
        # `normalize` rounds its input to the dtype that it is given.
        wide = accumulator(dtype, v)
        if has_custom_backward(v, params, self.dtype):
            w, _ = normalize(nnx.State(params), v, None, NormConfig(axes, self.epsilon, wide))
        else:
            w = jax.nn.standardize(v.astype(wide), axes.reduced, epsilon=self.epsilon)
            if "scale" in params:
                w = w * axes.along(params["scale"], v.shape)
        return w.astype(dtype)

    def _weights(self) -> Iterator[tuple[tuple[Any, ...], nnx.Param]]:
        for path, param in _parameters(self.layer_instance):
            if self.variable_filter(path, param):
                yield path, param


def _parameters(layer: nnx.Module) -> Any:
    return nnx.to_flat_state(nnx.state(layer, nnx.Param))


def _path_string(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
