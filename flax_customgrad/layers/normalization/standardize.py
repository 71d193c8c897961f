"""standardize: zero mean and unit variance along axes, as a function.

    forward   y  = (x - mean) rstd,  rstd = 1 / sqrt(variance + epsilon)
    backward  dx = rstd (g - mean(g) - y mean(g y))
    kept      x, and three numbers per statistic

That is the operation `normalize` without scale and bias.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from flax_customgrad.layers.drop_in import has_custom_backward
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.config import NormConfig
from flax_customgrad.layers.normalization.normalize import normalize

_of_jax = jax.nn.standardize
"""The function of JAX, whose name in `jax.nn` a user may give to ours."""


def standardize(
    x: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    mean: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    epsilon: ArrayLike = 1e-5,
    where: ArrayLike | None = None,
    *,
    algorithm: str = "fast",
) -> jax.Array:
    """`nnx.standardize` that keeps its input alone, and is right for a large mean and huge values.

    Args:
        x: array of any shape. Integers and complex numbers are left to `jax.nn.standardize`.
        axis: the axis or axes that share statistics; None for all.
        mean: the mean to subtract, if it is known; with it, or with a variance, the computation is
            that of `jax.nn.standardize`.
        variance: the variance to divide by, if it is known.
        epsilon: added to the variance.
        where: binary array, broadcastable to x: where statistics are taken. Where there is none
            the result and its gradient are 0.
        algorithm: "fast" or "stable", which changes nothing here: the variance is exact.

    Returns:
        Array of x's shape and dtype.

    Raises:
        ValueError: x lacks an axis, or there is no such algorithm.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.standardize(jnp.array([1e8, 1e8 + 16])).round(3)
        Array([-1.,  1.], dtype=float32)
    """
    known = mean is not None or variance is not None
    if known or not isinstance(epsilon, int | float) or not has_custom_backward(x, {}):
        return _of_jax(
            x,
            axis,  # type: ignore[arg-type]
            mean,
            variance,
            epsilon,
            where,
            algorithm=algorithm,  # type: ignore[call-arg]
        )
    if algorithm not in ("fast", "stable"):
        raise ValueError(f"algorithm={algorithm!r}: expected 'fast' or 'stable'")
    x = jnp.asarray(x)
    axes = NormAxes.of(x.ndim, range(x.ndim) if axis is None else axis, ())
    mask = None if where is None else jnp.asarray(where, bool)
    return normalize(nnx.State({}), x, mask, NormConfig(axes, float(epsilon), x.dtype))[0]
