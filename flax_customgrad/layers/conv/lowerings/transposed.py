"""Transposed: a convolution of a dilated input, as convolutions of the input without dilation.

Of the elements of a dilated input all but every s-th are zero, so an output o meets only the
elements t of the window for which `o + t d - low` is a multiple of `s`. They are the same for every
s-th output. Each of the s phases r, `o = m s + r`, is a convolution of its own with a part of the
kernel, `t = t_r + j s / gcd(s, d)`:

    y[m s + r] = sum_j x[m + j d / gcd(s, d) + (r + t_r d - low) / s] w[t_r + j s / gcd(s, d)]

Phases pay where windows do not overlap, and where they are large. XLA computes the gradient for the
input of a 3 x 3 convolution with strides of 2 as fast as four phases, compiles it in a third of the
time, and holds no array of phases.

The gradient of the kernel has x and g change places: it is that of the transposed map, whose input
is not dilated, mirrored. JAX's own is 20 to 90 times slower,
https://github.com/jax-ml/jax/issues/31662.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.conv.geometry import Geometry, mirror_kernel, pad_once
from flax_customgrad.layers.conv.lowerings.lowering import Lowering
from flax_customgrad.layers.conv.lowerings.xla_convolution import xla_correlate

_MAX_PHASES = 16  # each is a convolution to compile
_MAX_LEFT_TO_XLA = 9
"""The most elements of overlapping windows that XLA computes as fast as phases."""
_MAX_OF_FEW_FEATURES = 25
"""The same for outputs of up to `_FEW` features, such as the gradient of a colored image."""
_FEW = 3


@dataclass(frozen=True)
class TransposedLowering(Lowering):
    """One convolution for each phase of the output.

    Attributes:
        undilated: computes convolutions whose input is not dilated.
    """

    undilated: Lowering

    def fits(self, geometry: Geometry) -> bool:
        """Whether the input is dilated and every window is taken."""
        return any(d > 1 for d in geometry.input_dilation) and all(s == 1 for s in geometry.strides)

    def correlate(self, x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
        """One convolution for each phase of the output."""
        steps = geometry.input_dilation
        if math.prod(steps) > _MAX_PHASES or _is_small_and_overlaps(geometry):
            return xla_correlate(x, w, geometry)
        counts = [-(-o // s) for o, s in zip(geometry.out, steps, strict=True)]
        parts = [
            _part(w, geometry, phase, counts) for phase in itertools.product(*map(range, steps))
        ]
        kernels, geometries = zip(*filter(None, parts), strict=True)
        if geometry.is_depthwise:
            x, geometries = pad_once(x, geometries)
        found = map(functools.partial(self.undilated.correlate, x), kernels, geometries)
        zeros = jnp.zeros_like(x, shape=(x.shape[0], *counts, geometry.out_features))
        phases = [zeros if part is None else next(found) for part in parts]
        return _interleave_phases(phases, geometry, counts)

    def kernel_gradient(self, x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
        """The gradient of the kernel of the transposed map, mirrored."""
        dw = self.undilated.kernel_gradient(g, x, geometry.transposed)
        return mirror_kernel(dw, geometry.groups)


def _is_small_and_overlaps(geometry: Geometry) -> bool:
    """Whether it is a dense convolution of few elements a window, more than lie between inputs."""
    overlaps = any(k > s for k, s in zip(geometry.window, geometry.input_dilation, strict=True))
    most = _MAX_OF_FEW_FEATURES if geometry.out_features <= _FEW else _MAX_LEFT_TO_XLA
    is_small = math.prod(geometry.window) <= most
    is_dense = geometry.groups == 1 and set(geometry.kernel_dilation) == {1}
    return is_dense and is_small and overlaps


def _part(
    w: jax.Array, geometry: Geometry, phase: tuple[int, ...], counts: list[int]
) -> tuple[jax.Array, Geometry] | None:
    """The kernel and the geometry that yield every s-th output, from one on.

    Returns:
        None where no element of the window meets one of the input: these outputs are zero.
    """
    dilation, padding = [], []
    for axis, r in enumerate(phase):
        s, d = geometry.input_dilation[axis], geometry.kernel_dilation[axis]
        low, k = geometry.padding[axis][0], geometry.window[axis]
        meeting = [t for t in range(min(k, s)) if (r + t * d - low) % s == 0]
        if not meeting:
            return None
        first, step = meeting[0], s // math.gcd(s, d)
        w = lax.slice_in_dim(w, first, k, stride=step, axis=axis)
        dilation.append(d // math.gcd(s, d))
        start = (r + first * d - low) // s
        reach = (w.shape[axis] - 1) * dilation[-1] + counts[axis]
        padding.append((-start, reach + start - geometry.size[axis]))
    part = replace(
        geometry,
        window=w.shape[: geometry.rank],
        padding=tuple(padding),
        input_dilation=(1,) * geometry.rank,
        kernel_dilation=tuple(dilation),
    )
    return w, part


def _interleave_phases(phases: list[jax.Array], geometry: Geometry, counts: list[int]) -> jax.Array:
    """Phases of shape (batch, *counts, features) as the output they are phases of."""
    rank, steps = geometry.rank, geometry.input_dilation
    together = jnp.stack(phases).reshape(*steps, *phases[0].shape)
    order = [axis for i in range(rank) for axis in (rank + 1 + i, i)]
    together = lax.transpose(together, (rank, *order, 2 * rank + 1))
    size = [n * s for n, s in zip(counts, steps, strict=True)]
    y = together.reshape(together.shape[0], *size, together.shape[-1])
    return lax.slice(y, (0,) * y.ndim, (y.shape[0], *geometry.out, y.shape[-1]))
