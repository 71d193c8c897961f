"""Transposed: an input spread out by its dilation, as convolutions of what is not.

Of the elements of a spread input all but every s-th are zero, so an output o meets only the
elements t of the window for which o + t d - low is a multiple of s. They are the same for every
s-th output. Each of the s phases r, o = m s + r, is a convolution of its own with a part of the
kernel, t = t_r + j s / gcd(s, d):

    y[m s + r] = sum_j x[m + j d / gcd(s, d) + (r + t_r d - low) / s] w[t_r + j s / gcd(s, d)]

The gradient of the kernel has x and g change places: it is that of the transposed map, whose input
is not spread out, mirrored. JAX's own is 20 to 90 times slower,
https://github.com/jax-ml/jax/issues/31662.
"""

import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.conv.recipes import xla_convolution as xla
from flax_customgrad.layers.conv.recipes.geometry import ConvPass, Geometry, mirrored

_MOST_PHASES = 16  # each is a convolution to compile


def fits(geometry: Geometry) -> bool:
    """Whether the input is spread out and every window is taken.

    Args:
        geometry: any.
    """
    return any(d > 1 for d in geometry.input_dilation) and all(s == 1 for s in geometry.strides)


def correlate(x: jax.Array, w: jax.Array, geometry: Geometry, part: ConvPass) -> jax.Array:
    """One convolution for each phase of the output.

    Args:
        x: array of shape (batch, *size, in_features).
        w: array of shape (*window, in_features // groups, out_features).
        geometry: one that fits.
        part: computes one that is not spread out.
    """
    steps = geometry.input_dilation
    if math.prod(steps) > _MOST_PHASES:
        return xla.correlate(x, w, geometry)
    counts = [-(-o // s) for o, s in zip(geometry.out, steps, strict=True)]
    phases = [
        _phase(x, w, geometry, phase, counts, part)
        for phase in itertools.product(*map(range, steps))
    ]
    return _interleaved(phases, geometry, counts)


def kernel_gradient(x: jax.Array, g: jax.Array, geometry: Geometry, part: ConvPass) -> jax.Array:
    """The gradient of the kernel of the transposed map.

    Args:
        x: array of shape (batch, *size, in_features).
        g: array of shape (batch, *out, out_features).
        geometry: one that fits.
        part: computes one that is not spread out.

    Returns:
        Array of shape (*window, in_features // groups, out_features).
    """
    return mirrored(part(g, x, geometry.transposed), geometry.groups)


def _phase(
    x: jax.Array,
    w: jax.Array,
    geometry: Geometry,
    phase: tuple[int, ...],
    counts: list[int],
    part: ConvPass,
) -> jax.Array:
    """Every s-th output, from one on."""
    dilation, padding = [], []
    for axis, r in enumerate(phase):
        s, d = geometry.input_dilation[axis], geometry.kernel_dilation[axis]
        low, k = geometry.padding[axis][0], geometry.window[axis]
        meeting = [t for t in range(min(k, s)) if (r + t * d - low) % s == 0]
        if not meeting:
            shape = (len(x), *counts, geometry.out_features)
            return jnp.zeros_like(x, shape=shape)
        first, every = meeting[0], s // math.gcd(s, d)
        w = lax.slice_in_dim(w, first, k, stride=every, axis=axis)
        dilation.append(d // math.gcd(s, d))
        start = (r + first * d - low) // s
        reach = (w.shape[axis] - 1) * dilation[-1] + counts[axis]
        padding.append((-start, reach + start - geometry.size[axis]))
    return part(
        x,
        w,
        replace(
            geometry,
            window=w.shape[: geometry.rank],
            padding=tuple(padding),
            input_dilation=(1,) * geometry.rank,
            kernel_dilation=tuple(dilation),
        ),
    )


def _interleaved(phases: list[jax.Array], geometry: Geometry, counts: list[int]) -> jax.Array:
    """Phases of shape (batch, *counts, features) as the output they are phases of."""
    rank, steps = geometry.rank, geometry.input_dilation
    together = jnp.stack(phases).reshape(*steps, *phases[0].shape)
    order = [axis for i in range(rank) for axis in (rank + 1 + i, i)]
    together = lax.transpose(together, (rank, *order, 2 * rank + 1))
    ends = [n * s for n, s in zip(counts, steps, strict=True)]
    y = together.reshape(together.shape[0], *ends, together.shape[-1])
    return lax.slice(y, (0,) * y.ndim, (len(y), *geometry.out, y.shape[-1]))
