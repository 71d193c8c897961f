"""Sums and averages of windows.

    forward   y[o]  = sum of x over window o, divided by n or by n[o]
    backward  dx[i] = sum of g[o] over the windows o that see element i, divided alike
    kept      nothing

n is the size of a window, n[o] how many elements of an image window o sees. Sums run in float32 and
are rounded once; nnx adds bfloat16 in the order of the platform and rounds the quotient again.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.pooling.pool_arguments import Pooling
from flax_customgrad.layers.pooling.windows import Then, Windows, along
from flax_customgrad.numerics.accumulation import accumulator, fusion_barrier

Divisor = Literal["nothing", "size", "inside"]
"""What the sum of a window is divided by: nothing, its elements, or those that are no padding."""


class Residuals(NamedTuple):
    """What the backward of `sum_pool` keeps: no array."""

    pooling: Pooling
    divisor: Divisor


@custom_vjp
def sum_pool(x: jax.Array, pooling: Pooling, divisor: Divisor, dtype: Any) -> jax.Array:
    """The sum of each window, or its average.

    Args:
        x: array of shape (..., *spatial, features), float.
        pooling: the windows.
        divisor: what the sums are divided by.
        dtype: dtype of the result, a floating one.

    Returns:
        Array of shape (..., *windows, features).
    """
    return _value(pooling, divisor, dtype, x)


def _fwd(
    x: jax.Array, pooling: Pooling, divisor: Divisor, dtype: Any
) -> tuple[jax.Array, Residuals]:
    return sum_pool(x, pooling, divisor, dtype), Residuals(pooling, divisor)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None, None, None]:
    return _gradient(res.pooling, res.divisor, g), None, None, None


sum_pool.defvjp(_fwd, _bwd)


# One call, also outside of any jit.
_once = functools.partial(jax.jit, inline=True)


@functools.partial(_once, static_argnums=(0, 1, 2))
def _value(pooling: Pooling, divisor: Divisor, dtype: Any, x: jax.Array) -> jax.Array:
    def by_slices(x: jax.Array) -> jax.Array:
        return along(pooling.axes(x.ndim), _sum, x)

    def by_reduce_window(x: jax.Array) -> jax.Array:
        return pooling.reduce_window(x, 0.0, lax.add)

    x = x.astype(accumulator(x))
    # Of one window over a whole image XLA makes a plain sum itself.
    by_cpu = by_reduce_window if pooling.is_whole else by_slices
    y = lax.platform_dependent(x, cpu=by_cpu, default=by_reduce_window)
    return fusion_barrier(
        (y if divisor == "nothing" else y / _number(pooling, divisor, y)).astype(dtype)
    )


@functools.partial(_once, static_argnums=(0, 1))
def _gradient(pooling: Pooling, divisor: Divisor, g: jax.Array) -> jax.Array:
    def by_slices(g: jax.Array) -> jax.Array:
        return along(pooling.axes(g.ndim), _spread, g)

    g = g.astype(accumulator(g))
    if divisor == "inside":
        g = g / _number(pooling, divisor, g)
    dx = lax.platform_dependent(
        g, cpu=by_slices, default=functools.partial(_by_reduce_window, pooling)
    )
    return fusion_barrier(dx * (1 / math.prod(pooling.window_shape)) if divisor == "size" else dx)


def _sum(windows: Windows, x: jax.Array, then: Then) -> jax.Array:
    return windows.combine(lambda seen: then(functools.reduce(lax.add, seen)), (x, 0))


def _spread(windows: Windows, g: jax.Array, then: Then) -> jax.Array:
    return windows.spread(g, then=then)


def _by_reduce_window(pooling: Pooling, g: jax.Array) -> jax.Array:
    """The transpose of a sum of windows, as JAX makes it: one of a dilated g."""
    config, window = [(0, 0, 0)] * g.ndim, [1] * g.ndim
    for w in pooling.axes(g.ndim):
        low, reach = w.padding[0], (w.number - 1) * w.stride + 1
        config[w.axis] = (w.size - 1 - low, w.length + low - reach, w.stride - 1)
        window[w.axis] = w.size
    g = lax.pad(g, jnp.zeros((), g.dtype), config)
    return lax.reduce_window(g, 0.0, lax.add, window, [1] * g.ndim, "VALID")


def _number(pooling: Pooling, divisor: Divisor, y: jax.Array) -> Any:
    """By what the sum of each window is divided; broadcasts against y."""
    if divisor == "size":
        return math.prod(pooling.window_shape)
    number = jnp.ones((), y.dtype)
    for w in pooling.axes(y.ndim):
        begin = np.arange(w.number) * w.stride - w.padding[0]
        inside = np.clip(begin + w.size, 0, w.length) - np.clip(begin, 0, w.length)
        number = number * inside.reshape(-1, *[1] * (y.ndim - w.axis - 1)).astype(y.dtype)
    return number
