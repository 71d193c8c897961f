"""avg_pool: averages of windows, and the sums that they are made of.

    forward   y[o]  = sum of x over window o, divided by n or by n[o]
    backward  dx[i] = sum of g[o] over the windows o that see element i, divided alike
    kept      nothing

`n` is the size of a window, `n[o]` how many elements of an image window o sees. Sums run in float32
and are rounded once; nnx adds bfloat16 in the order of the platform and rounds the quotient again.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import has_known_size
from flax_customgrad.layers.pooling.pool_arguments import (
    Padding,
    Pooling,
    is_pooled_by_slices,
    parse_pooling,
)
from flax_customgrad.layers.pooling.windows import Continuation, Windows, apply_along_axes
from flax_customgrad.numerics.accumulation import accumulator, fusion_barrier
from flax_customgrad.numerics.by_platform import by_platform
from flax_customgrad.numerics.dtypes import as_array, takes_custom_backward

Divisor = Literal["one", "window_size", "elements_inside"]
"""What the sum of a window is divided by: 1, its elements, or those that are no padding."""


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
    return _sum_value(pooling, divisor, dtype, x)


def _fwd(
    x: jax.Array, pooling: Pooling, divisor: Divisor, dtype: Any
) -> tuple[jax.Array, Residuals]:
    return sum_pool(x, pooling, divisor, dtype), Residuals(pooling, divisor)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None, None, None]:
    pooling, divisor = res
    chex.assert_shape(g, (..., *pooling.out, None))
    batch, features = g.shape[: g.ndim - 1 - len(pooling.out)], g.shape[-1]
    dx = _sum_gradient(pooling, divisor, g)
    chex.assert_shape(dx, (*batch, *pooling.spatial_shape, features))
    return dx, None, None, None


sum_pool.defvjp(_fwd, _bwd)


# The jit makes one call of it outside of any other jit too, and inside is inlined.
@functools.partial(jax.jit, inline=True, static_argnums=(0, 1, 2))
def _sum_value(pooling: Pooling, divisor: Divisor, dtype: Any, x: jax.Array) -> jax.Array:
    def by_slices(x: jax.Array) -> jax.Array:
        return apply_along_axes(pooling.axes(x.ndim), _sum_along_axis, x)

    def by_reduce_window(x: jax.Array) -> jax.Array:
        return pooling.reduce_window(x, 0.0, lax.add)

    x = x.astype(accumulator(x))
    # Of one window over a whole image XLA makes a plain sum itself.
    by_cpu = by_reduce_window if pooling.is_global else by_slices
    y = by_platform(x, cpu=by_cpu, default=by_reduce_window)
    return fusion_barrier(
        (y if divisor == "one" else y / _window_divisor(pooling, divisor, y)).astype(dtype)
    )


@functools.partial(jax.jit, inline=True, static_argnums=(0, 1))
def _sum_gradient(pooling: Pooling, divisor: Divisor, g: jax.Array) -> jax.Array:
    def by_slices(g: jax.Array) -> jax.Array:
        return apply_along_axes(pooling.axes(g.ndim), _scatter_along_axis, g)

    g = g.astype(accumulator(g))
    if divisor == "elements_inside":
        g = g / _window_divisor(pooling, divisor, g)
    dx = by_platform(
        g, cpu=by_slices, default=functools.partial(_scatter_by_reduce_window, pooling)
    )
    return fusion_barrier(
        dx * (1 / math.prod(pooling.window_shape)) if divisor == "window_size" else dx
    )


def _sum_along_axis(windows: Windows, x: jax.Array, then: Continuation) -> jax.Array:
    return windows.combine(lambda seen: then(functools.reduce(lax.add, seen)), (x, 0))


def _scatter_along_axis(windows: Windows, g: jax.Array, then: Continuation) -> jax.Array:
    return windows.scatter(g, then=then)


def _scatter_by_reduce_window(pooling: Pooling, g: jax.Array) -> jax.Array:
    """The transpose of a sum of windows, as JAX makes it: one of a dilated g."""
    config, window = [(0, 0, 0)] * g.ndim, [1] * g.ndim
    for w in pooling.axes(g.ndim):
        low, reach = w.padding[0], (w.number - 1) * w.stride + 1
        config[w.axis] = (w.size - 1 - low, w.length + low - reach, w.stride - 1)
        window[w.axis] = w.size
    g = lax.pad(g, jnp.zeros((), g.dtype), config)
    return lax.reduce_window(g, 0.0, lax.add, window, [1] * g.ndim, "VALID")


def _window_divisor(pooling: Pooling, divisor: Divisor, y: jax.Array) -> Any:
    """By what the sum of each window is divided; broadcasts against y."""
    if divisor == "window_size":
        return math.prod(pooling.window_shape)
    number = jnp.ones((), y.dtype)
    for w in pooling.axes(y.ndim):
        begin = np.arange(w.number) * w.stride - w.padding[0]
        inside = np.clip(begin + w.size, 0, w.length) - np.clip(begin, 0, w.length)
        number = number * inside.reshape(-1, *[1] * (y.ndim - w.axis - 1)).astype(y.dtype)
    return number


_of_nnx = nnx.avg_pool
"""The function of nnx, whose name a user may give to ours."""


def avg_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> jax.Array:
    """The average of each window.

    Args:
        inputs: array of shape (*batch, *spatial, features).
        window_shape: the size of a window along each spatial axis.
        strides: how far one window is from the next; 1 by default.
        padding: as for `max_pool`.
        count_include_pad: whether elements of the padding count, which are 0.

    Returns:
        Array of shape (*batch, *windows, features), of the dtype of the inputs; with
        `count_include_pad=False` of float32 or a wider one, as in flax.nnx.

    Raises:
        TypeError: an argument is not of whole numbers.
        ValueError: the arguments do not fit each other or the inputs.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> signal = jnp.array([[1.0], [2.0], [6.0]])
        >>> fcg.avg_pool(signal, (3,), padding="SAME", count_include_pad=False)[:, 0]
        Array([1.5, 3. , 4. ], dtype=float32)
    """
    inputs = as_array(inputs)
    if not has_known_size(inputs, np.size(window_shape)):
        return _of_nnx(
            inputs,
            window_shape,
            strides,
            padding,  # type: ignore[arg-type]
            count_include_pad,
        )
    pooling = parse_pooling(inputs, window_shape, strides, padding)
    if not is_pooled_by_sums(inputs, pooling):
        y = pooling.reduce_window(inputs, 0.0, lax.add)
        if count_include_pad:
            return y / np.prod(window_shape)
        ones = jnp.ones(
            (*(1,) * (inputs.ndim - 1 - len(pooling.spatial_shape)), *pooling.spatial_shape, 1)
        )
        return y / pooling.reduce_window(ones, 0.0, lax.add)
    if count_include_pad:
        return sum_pool(inputs, pooling, "window_size", inputs.dtype)
    # nnx counts in the default dtype.
    dtype = jnp.promote_types(inputs.dtype, jnp.result_type(float))
    return sum_pool(inputs, pooling, "elements_inside", dtype)


def is_pooled_by_sums(inputs: Any, pooling: Pooling) -> bool:
    """Whether the hand-written backward of sums applies.

    Args:
        inputs: array of shape (*batch, *spatial, features).
        pooling: the windows.
    """
    return is_pooled_by_slices(inputs, pooling) or (
        takes_custom_backward(inputs) and inputs.size > 0 and pooling.is_global
    )
