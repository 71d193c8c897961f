"""max_pool and min_pool: the extreme of each window, and which element the window has it from.

    forward   y[o]  = max of x over window o
    backward  dx[i] = sum of g[o] over the windows o whose first maximum is element i
    kept      x

The first is the first one as the window is read, row by row, padding included, as in XLA's
select_and_scatter. It is found along one axis after the other, the last axis first: the first
maximum within each row, then the first row. Of a window that holds NaN the value is NaN, and one of
its elements gets the gradient.

The backward finds the offset of each maximum anew. To keep it instead would hold as much at a time
(52 MB in a network of three convolutions and 2x2 poolings, 207 MB with nnx; 367 MB in eight layers
of 3x3, 650 MB with nnx), and other platforms could not use it: there XLA's own operations run.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from flax_customgrad.numerics.dtypes import as_array


@dataclass(frozen=True)
class Extreme:
    """Maximum or minimum.

    Attributes:
        reduce_fn: the extreme of two arrays.
        beats: whether an element takes the place of the one before it.
        identity: what the padding holds.
        of_nnx: the function of nnx.
    """

    reduce_fn: Callable[[jax.Array, jax.Array], jax.Array]
    beats: Callable[[jax.Array, jax.Array], jax.Array]
    identity: float
    of_nnx: Callable[..., jax.Array]


MAX = Extreme(lax.max, lax.gt, -float("inf"), nnx.max_pool)
MIN = Extreme(lax.min, lax.lt, float("inf"), nnx.min_pool)


class Residuals(NamedTuple):
    """What the backward of `extreme_pool` keeps: only what the caller holds anyway."""

    x: jax.Array
    pooling: Pooling
    extreme: Extreme


@custom_vjp
def extreme_pool(x: jax.Array, pooling: Pooling, extreme: Extreme) -> jax.Array:
    """The largest or smallest element of each window.

    Args:
        x: array of shape (..., *spatial, features), float.
        pooling: the windows.
        extreme: `MAX` or `MIN`.

    Returns:
        Array of shape (..., *windows, features) and the dtype of x.
    """
    return _extreme_value(pooling, extreme, x)


def _fwd(x: jax.Array, pooling: Pooling, extreme: Extreme) -> tuple[jax.Array, Residuals]:
    return extreme_pool(x, pooling, extreme), Residuals(x, pooling, extreme)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None, None]:
    x, pooling, extreme = res
    batch, features = x.shape[: x.ndim - 1 - len(pooling.spatial_shape)], x.shape[-1]
    chex.assert_shape(
        [x, g],
        [(*batch, *pooling.spatial_shape, features), (*batch, *pooling.out, features)],
    )
    dx = _extreme_gradient(pooling, extreme, x, g)
    chex.assert_equal_shape([dx, x])
    return dx, None, None


extreme_pool.defvjp(_fwd, _bwd)


# The jit makes one call of it outside of any other jit too, and inside is inlined.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _extreme_value(pooling: Pooling, extreme: Extreme, x: jax.Array) -> jax.Array:
    def by_slices(x: jax.Array) -> jax.Array:
        step = functools.partial(_extreme_along_axis, extreme)
        y = apply_along_axes(pooling.axes(x.ndim), step, x.astype(accumulator(x)))
        return fusion_barrier(y.astype(x.dtype))

    by_reduce_window = functools.partial(_reduce_extreme, pooling, extreme)
    return by_platform(x, cpu=by_slices, default=by_reduce_window)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _extreme_gradient(pooling: Pooling, extreme: Extreme, x: jax.Array, g: jax.Array) -> jax.Array:
    def by_slices(x: jax.Array, g: jax.Array) -> jax.Array:
        seen, dx, offsets = x.astype(accumulator(x)), g.astype(accumulator(g)), []
        for windows in reversed(pooling.axes(x.ndim)):
            offsets.append(_first_offset(extreme, windows, seen))
            seen = _extreme_along_axis(extreme, windows, seen)
        for windows in pooling.axes(x.ndim):
            dx = windows.scatter(dx, offsets.pop())
        return fusion_barrier(dx)

    def by_scatter(x: jax.Array, g: jax.Array) -> jax.Array:
        _, pull = jax.vjp(functools.partial(_reduce_extreme, pooling, extreme), x)
        return pull(g)[0].astype(accumulator(g))

    return by_platform(x, g, cpu=by_slices, default=by_scatter)


def _reduce_extreme(pooling: Pooling, extreme: Extreme, x: jax.Array) -> jax.Array:
    return pooling.reduce_window(x, extreme.identity, extreme.reduce_fn)


def _extreme_along_axis(
    extreme: Extreme, windows: Windows, x: jax.Array, then: Continuation = lambda y: y
) -> jax.Array:
    """The extreme of what each window sees along one axis."""
    image = x, extreme.identity
    return windows.combine(lambda seen: then(functools.reduce(extreme.reduce_fn, seen)), image)


def _first_offset(extreme: Extreme, windows: Windows, x: jax.Array) -> jax.Array:
    """The offset at which each window first sees its extreme, in float32.

    XLA on a CPU computes again for every reader what it counts as cheap, and an offset has as many
    readers as its window has elements. A square root counts as expensive, and is stored: so the
    offset is that of its square.
    """
    stored = windows.overlap > 1 or windows.size > 2

    def first(seen: list[jax.Array]) -> jax.Array:
        best, *others = seen
        offset = jnp.zeros_like(best, dtype=jnp.float32)
        for t, other in enumerate(others, start=1):
            beats = extreme.beats(other, best)
            best = jnp.where(beats, other, best)
            offset = jnp.where(beats, jnp.float32(t * t if stored else t), offset)
        return lax.sqrt(offset) if stored else offset

    return windows.combine(first, (x, extreme.identity), separate_edges=windows.separates_edges)


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """The largest element of each window.

    Of several equal ones the first gets the gradient, as in flax.nnx. Padding holds minus infinity.

    Args:
        inputs: array of shape (*batch, *spatial, features), with any number of batch axes, or none.
        window_shape: the size of a window along each spatial axis.
        strides: how far one window is from the next along each spatial axis; 1 by default.
        padding: "SAME", "SAME_LOWER" or "VALID", or for each spatial axis a pair of numbers, how
            many elements are added before and after it.

    Returns:
        Array of shape (*batch, *windows, features), of the dtype of the inputs.

    Raises:
        TypeError: an argument is not of whole numbers.
        ValueError: the arguments do not fit each other or the inputs; the error says what would.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> images = jnp.arange(16.0).reshape(1, 4, 4, 1)
        >>> fcg.max_pool(images, (2, 2), strides=(2, 2))[0, :, :, 0]
        Array([[ 5.,  7.],
               [13., 15.]], dtype=float32)
    """
    return _pool_extreme(MAX, inputs, window_shape, strides, padding)


def min_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """The smallest element of each window; otherwise as `max_pool`, with infinity for padding.

    Args:
        inputs: array of shape (*batch, *spatial, features).
        window_shape: the size of a window along each spatial axis.
        strides: how far one window is from the next; 1 by default.
        padding: as for `max_pool`.

    Returns:
        Array of shape (*batch, *windows, features), of the dtype of the inputs.

    Raises:
        TypeError: an argument is not of whole numbers.
        ValueError: the arguments do not fit each other or the inputs.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.min_pool(jnp.arange(6.0).reshape(6, 1), (2,), (2,)).ravel()
        Array([0., 2., 4.], dtype=float32)
    """
    return _pool_extreme(MIN, inputs, window_shape, strides, padding)


def _pool_extreme(
    extreme: Extreme, inputs: Any, window_shape: Any, strides: Any, padding: Any
) -> jax.Array:
    inputs = as_array(inputs)
    if not has_known_size(inputs, np.size(window_shape)):
        return extreme.of_nnx(inputs, window_shape, strides, padding)
    pooling = parse_pooling(inputs, window_shape, strides, padding)
    if is_pooled_by_slices(inputs, pooling):
        return extreme_pool(inputs, pooling, extreme)
    return pooling.reduce_window(inputs, extreme.identity, extreme.reduce_fn)
