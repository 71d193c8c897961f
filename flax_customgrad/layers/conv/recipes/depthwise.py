"""Depthwise: groups of one or two features, for which a product of matrices has nothing to do.

With one feature in and out per group, for each element t of the window:

    y[n, o, c]  = sum_t   x[n, o s + t d - low, c] w[t, c]
    dW[t, c]    = sum_{n, o} x[n, o s + t d - low, c] g[n, o, c]

y is one pass over the images: k shifted copies of x, scaled and added, which XLA turns into vector
code along the features. The sums of dW are in `sums_under_windows`.

Groups of several features are taken apart: into pairs of one input and one output each.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flax_customgrad.layers.conv.recipes.geometry import Geometry
from flax_customgrad.layers.conv.recipes.sums_under_windows import at_once, in_blocks
from flax_customgrad.numerics.accumulation import fusion_barrier

_WRITTEN_OUT = 16


def fits(geometry: Geometry) -> bool:
    """Whether groups are narrow and the input is not spread out.

    Args:
        geometry: any.
    """
    pairs = geometry.in_features * geometry.out_features // geometry.groups**2
    return pairs <= 4 and all(d == 1 for d in geometry.input_dilation)


def correlate(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """Shifted copies of the input, scaled and added.

    Args:
        x: array of shape (batch, *size, in_features).
        w: array of shape (*window, in_features // groups, out_features).
        geometry: one that fits.
    """
    x = geometry.pad(x)
    ins, outs = _per_group(geometry)
    parts = [
        functools.reduce(
            jnp.add,
            (
                geometry.under(tap, x[..., c::ins]) * w[tap][c, f::outs]
                for c in range(ins)
                for tap in geometry.taps
            ),
        )
        for f in range(outs)
    ]
    return fusion_barrier(_interleaved(parts))


def kernel_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """For each element of the window the sum of a shifted copy times g.

    Args:
        x: array of shape (batch, *size, in_features).
        g: array of shape (batch, *out, out_features).
        geometry: one that fits.

    Returns:
        Array of shape (*window, in_features // groups, out_features).
    """
    ins, outs = _per_group(geometry)
    few = math.prod(geometry.window) <= _WRITTEN_OUT
    sums: Callable[..., jax.Array] = in_blocks if few else at_once
    rows = [
        _interleaved([sums(x[..., c::ins], g[..., f::outs], geometry) for f in range(outs)])
        for c in range(ins)
    ]
    return jnp.stack(rows, -2).reshape(*geometry.window, ins, geometry.out_features)


def _per_group(geometry: Geometry) -> tuple[int, int]:
    return geometry.in_features // geometry.groups, geometry.out_features // geometry.groups


def _interleaved(parts: list[jax.Array]) -> jax.Array:
    """Arrays of the first, second, ... feature of each group as one array of all features."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack(parts, -1).reshape(*parts[0].shape[:-1], -1)
