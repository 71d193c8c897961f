"""Normalizations of many rows, which XLA on a CPU fuses whole: `normalized_alone`, without more.

    d = x - mean(x),  e = d - mean(d)     mean(d) is what rounding left out of the mean
    v = mean(e^2) + epsilon
    y = scale e / sqrt(v) + bias

XLA makes one loop over the rows of this, together with the product before it and the one behind, as
long as nothing is written down, looked at or chosen. So there is no branch, and one factor for
squares, 1. Where they overflow the row is NaN; the inverse of infinity would be 0.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_customgrad.layers.drop_in import Parameters
from flax_customgrad.layers.normalization.config import NormConfig
from flax_customgrad.layers.normalization.scaled_squares import TINY
from flax_customgrad.numerics.platform import is_one_cpu
from flax_customgrad.numerics.sizes import is_known

# 1 / sqrt(v) is sqrt(_LARGE / v - _LITTLE) / sqrt(_LARGE): of an infinite v there is no root, and
# of all others _LITTLE changes no digit. To use v twice would stop the fusion.
_LARGE, _LITTLE = np.float32(2.0**26), np.float32(2.0**-126)

# XLA fuses operations on arrays of so many elements.
_LEAST_STATISTICS = 4096


def fuses(config: NormConfig, x: jax.Array) -> bool:
    """Whether XLA fuses a normalization whole, and in a backward what leads to dx.

    Args:
        config: axes, dtype and the rest.
        x: the input, of any shape, float.
    """
    axes = config.axes
    is_of_rows = axes.groups is None and axes.reduced == tuple(range(-len(axes.reduced), 0))
    return (
        is_of_rows
        and is_known(x.size)
        and math.prod(axes.statistic_shape(x.shape)) >= _LEAST_STATISTICS
        and axes.count(x.shape) > 1
        and config.sum_dtype == jnp.float32
        and config.epsilon >= TINY
        and config.devices.axis_name is None
        and is_one_cpu()
    )


@functools.partial(jax.jit, static_argnums=2)
def normalized_alone(params: Parameters, x: jax.Array, config: NormConfig) -> jax.Array:
    """Normalizes rows.

    Args:
        params: those of `normalize`.
        x: the input, of any shape, float.
        config: axes, dtype and the rest.

    Returns:
        The output of `normalize`.
    """
    axes, share = config.axes, np.float32(1 / config.axes.count(x.shape))

    def mean(a: jax.Array) -> jax.Array:
        return lax.mul(axes.sum(a), share)

    e = config.rounded(x).astype(share.dtype)
    # The digits that rounding the mean costs half precision does not hold.
    n_means = 2 if config.dtype == share.dtype else 1
    for _ in range(n_means if config.centered else 0):
        e = lax.sub(e, axes.spread(mean(e), x.shape))
    v = lax.add(mean(lax.square(e)), np.float32(config.epsilon))
    root = lax.sqrt(lax.sub(lax.div(_LARGE, v), _LITTLE))
    rstd = axes.spread(lax.mul(root, np.float32(2.0**-13)), x.shape)
    y = lax.mul(e, rstd)
    return axes.scaled_and_shifted(y, params).astype(config.dtype)
