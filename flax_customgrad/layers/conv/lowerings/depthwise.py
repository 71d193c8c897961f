"""Depthwise: groups of one or two features, for which a product of matrices has nothing to do.

With one feature in and out per group, for each element t of the window:

    y[n, o, c] = sum_t      x[n, o s + t d - low, c] w[t, c]
    dw[t, c]   = sum_{n, o} x[n, o s + t d - low, c] g[n, o, c]

`y` is one pass over the images: k shifted copies of x, scaled and added, which XLA turns into
vector code along the features. Each of these copies is a part of the program, so they are computed
once (`unfused`), in one call for `y` and `dx`, which is traced and compiled once for layers of one
shape. The sums of `dw` are in `depthwise_sums`.

Groups of several features are taken apart: into pairs of one input and one output each.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.conv.geometry import Geometry, pad_once
from flax_customgrad.layers.conv.lowerings.depthwise_sums import (
    sum_all_at_once,
    sum_by_blocks,
    sum_by_rows,
)
from flax_customgrad.layers.conv.lowerings.lowering import Lowering
from flax_customgrad.numerics.sizes import is_known
from flax_customgrad.numerics.unfused import unfused

# A window of more elements is summed by one reduction, of which a program holds one alone. So is an
# array of fewer: sums written out take half a second to compile, and gain a tenth of a millisecond.
_MAX_UNROLLED_TAPS = 16
_MIN_UNROLLED_ELEMENTS = 1 << 18

# A window of more elements is summed by rows, which compiles sooner; not an array of more, which
# would be read from memory for each of them.
_MAX_SUMMED_TAPS = 32
_MAX_ELEMENTS_BY_ROWS = 1 << 16

# A convolution of more elements is computed once, of fewer in each of the passes that use it.
_MAX_FUSED_TAPS = 4


class DepthwiseLowering(Lowering):
    """Shifted copies of the input, scaled and added."""

    def fits(self, geometry: Geometry) -> bool:
        """Whether groups are narrow and the input is not dilated."""
        return geometry.is_depthwise and all(d == 1 for d in geometry.input_dilation)

    def correlate(self, x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
        """Shifted copies of the input, scaled and added."""
        scaled_copies = _scaled_copies
        if math.prod(geometry.window) > _MAX_FUSED_TAPS:
            scaled_copies = _unfused_scaled_copies
            x, (geometry,) = pad_once(x, [geometry])
        _, outs = _features_per_group(geometry)
        return _interleave([scaled_copies(x, w[..., f::outs], geometry) for f in range(outs)])

    def kernel_gradient(self, x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
        """For each element of the window the sum of a shifted copy times g."""
        ins, outs = _features_per_group(geometry)
        sums = _sums(g, geometry)
        rows = [
            _interleave([sums(x[..., c::ins], g[..., f::outs], geometry) for f in range(outs)])
            for c in range(ins)
        ]
        return jnp.stack(rows, -2).reshape(*geometry.window, ins, geometry.out_features)


def _scaled_copies(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """One output feature of each group: the sum of shifted copies of x, each times its scale.

    Args:
        x: array of shape (batch, *size, features).
        w: array of shape (*window, features per group, groups).
        geometry: where the windows lie.
    """
    row, parts = geometry.rows(geometry.pad(x))
    kernels = lax.split(w, [1] * w.shape[0])
    return functools.reduce(
        lax.add, [_scaled_row(x, w, row) for x, w in zip(parts, kernels, strict=True)]
    )


# XLA inlines the call; JAX traces and lowers it once for all rows of a window.
@functools.partial(jax.jit, static_argnums=2)
def _scaled_row(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """The part of `_scaled_copies` that one row of the window contributes."""
    *window, ins, groups = w.shape
    n = math.prod(window) * ins
    # Of one axis each, which XLA broadcasts in one operation.
    scales = (s.reshape(groups) for s in lax.split(w.reshape(n, groups), [1] * n))
    copies = []
    for tap in geometry.taps:
        for c in range(ins):
            seen = geometry.slice_at(tap, x if ins == 1 else x[..., c::ins])
            scale = lax.broadcast_in_dim(next(scales), seen.shape, (seen.ndim - 1,))
            copies.append(lax.mul(seen, scale))
    return functools.reduce(lax.add, copies)


_unfused_scaled_copies = unfused(static_argnums=2)(_scaled_copies)


def _sums(g: jax.Array, geometry: Geometry) -> Callable[..., jax.Array]:
    """What sums a kernel's gradient, for the size of g and of the window."""
    taps, columns = math.prod(geometry.window), math.prod(geometry.window[1:])
    size = g.size if is_known(g.size) else math.inf
    if size >= _MIN_UNROLLED_ELEMENTS and taps <= _MAX_UNROLLED_TAPS:
        return sum_by_blocks
    is_by_rows = size < _MAX_ELEMENTS_BY_ROWS and taps > _MAX_SUMMED_TAPS and columns > 1
    return sum_by_rows if is_by_rows else sum_all_at_once


def _features_per_group(geometry: Geometry) -> tuple[int, int]:
    """Features of the input and of the output."""
    return geometry.in_features // geometry.groups, geometry.out_features // geometry.groups


def _interleave(parts: list[jax.Array]) -> jax.Array:
    """Arrays of the first, second, ... feature of each group as one array of all features."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack(parts, -1).reshape(*parts[0].shape[:-1], -1)
