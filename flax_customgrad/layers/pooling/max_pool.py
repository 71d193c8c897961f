"""Maxima and minima of windows, and which element each window has its own from.

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
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.pooling.pool_arguments import Pooling
from flax_customgrad.layers.pooling.windows import Then, Windows, along
from flax_customgrad.numerics.accumulation import accumulator, fusion_barrier


@dataclass(frozen=True)
class Extreme:
    """Maximum or minimum.

    Attributes:
        of: the extreme of two arrays.
        beats: whether an element takes the place of the one before it.
        identity: what the padding holds.
    """

    of: Callable[[jax.Array, jax.Array], jax.Array]
    beats: Callable[[jax.Array, jax.Array], jax.Array]
    identity: float


MAX = Extreme(lax.max, lax.gt, -float("inf"))
MIN = Extreme(lax.min, lax.lt, float("inf"))


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
    return _value(pooling, extreme, x)


def _fwd(x: jax.Array, pooling: Pooling, extreme: Extreme) -> tuple[jax.Array, Residuals]:
    return extreme_pool(x, pooling, extreme), Residuals(x, pooling, extreme)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None, None]:
    dx = _gradient(res.pooling, res.extreme, res.x, g)
    chex.assert_equal_shape([dx, res.x])
    return dx, None, None


extreme_pool.defvjp(_fwd, _bwd)


# One call, also outside of any jit.
_once = functools.partial(jax.jit, static_argnums=(0, 1), inline=True)


@_once
def _value(pooling: Pooling, extreme: Extreme, x: jax.Array) -> jax.Array:
    def by_slices(x: jax.Array) -> jax.Array:
        step = functools.partial(_extreme, extreme)
        y = along(pooling.axes(x.ndim), step, x.astype(accumulator(x)))
        return fusion_barrier(y.astype(x.dtype))

    by_reduce_window = functools.partial(_by_reduce_window, pooling, extreme)
    return lax.platform_dependent(x, cpu=by_slices, default=by_reduce_window)


@_once
def _gradient(pooling: Pooling, extreme: Extreme, x: jax.Array, g: jax.Array) -> jax.Array:
    def by_slices(x: jax.Array, g: jax.Array) -> jax.Array:
        seen, dx, offsets = x.astype(accumulator(x)), g.astype(accumulator(g)), []
        for windows in reversed(pooling.axes(x.ndim)):
            offsets.append(_offset(extreme, windows, seen))
            seen = _extreme(extreme, windows, seen)
        for windows in pooling.axes(x.ndim):
            dx = windows.spread(dx, offsets.pop())
        return fusion_barrier(dx)

    def by_scatter(x: jax.Array, g: jax.Array) -> jax.Array:
        _, pull = jax.vjp(functools.partial(_by_reduce_window, pooling, extreme), x)
        return pull(g)[0].astype(accumulator(g))

    return lax.platform_dependent(x, g, cpu=by_slices, default=by_scatter)


def _by_reduce_window(pooling: Pooling, extreme: Extreme, x: jax.Array) -> jax.Array:
    return pooling.reduce_window(x, extreme.identity, extreme.of)


def _extreme(
    extreme: Extreme, windows: Windows, x: jax.Array, then: Then = lambda y: y
) -> jax.Array:
    """The extreme of what each window sees along one axis."""
    image = x, extreme.identity
    return windows.combine(lambda seen: then(functools.reduce(extreme.of, seen)), image)


def _offset(extreme: Extreme, windows: Windows, x: jax.Array) -> jax.Array:
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

    return windows.combine(first, (x, extreme.identity), apart=windows.is_small)
