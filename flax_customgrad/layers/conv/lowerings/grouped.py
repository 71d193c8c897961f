"""Grouped: groups of several features, a few of them at a time in one dense convolution.

Groups of c features in and f out become one dense convolution of their block-diagonal kernel `W`:

    W[t, (q, c), (p, f)] = w[t, c, (q, f)] if p == q else 0
    dw[t, c, (q, f)]     = dW[t, (q, c), (q, f)]

That multiplies by zeros, so only as many groups are joined as fill 16 features; XLA's convolution
of fewer is no faster. The convolutions come one after another: a few written out, many in a loop,
so that the program does not grow with their number. (JAX's own `dw` of 32 groups of 4 takes 4 s, of
16 x 28 x 28 x 128 and a 3x3 window; this takes 10 ms.)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.conv.geometry import Geometry
from flax_customgrad.layers.conv.lowerings.lowering import Lowering

_JOINED_FEATURES = 16
_MAX_UNROLLED_PARTS = 4


@dataclass(frozen=True)
class GroupedLowering(Lowering):
    """Dense convolutions of block-diagonal kernels.

    Attributes:
        dense: computes the dense ones.
    """

    dense: Lowering

    def fits(self, geometry: Geometry) -> bool:
        """Whether there are groups."""
        return geometry.groups > 1

    def correlate(self, x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
        """Dense convolutions of block-diagonal kernels."""
        geometry, parts, joined = _split_geometry(geometry)

        def correlate_part(x: jax.Array, w: jax.Array) -> jax.Array:
            if joined > 1:
                w = einops.rearrange(w, "... c (p f) -> ... 1 c p f", p=joined)
                w = einops.rearrange(
                    w * _diagonal(joined, w.dtype), "... q c p f -> ... (q c) (p f)"
                )
            return self.dense.correlate(x, w, geometry)

        return _map_parts(correlate_part, parts, x, w)

    def kernel_gradient(self, x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
        """The blocks on the diagonal of the gradients of dense kernels."""
        geometry, parts, joined = _split_geometry(geometry)

        def gradient_of_part(x: jax.Array, g: jax.Array) -> jax.Array:
            dw = self.dense.kernel_gradient(x, g, geometry)
            if joined == 1:
                return dw
            dw = einops.rearrange(dw, "... (q c) (p f) -> ... q c p f", q=joined, p=joined)
            # Zeros off the diagonal: the sum takes one element.
            dw = jnp.sum(jnp.where(_diagonal(joined, bool), dw, 0), axis=-4)
            return einops.rearrange(dw, "... c p f -> ... c (p f)")

        return _map_parts(gradient_of_part, parts, x, g)


def _diagonal(n: int, dtype: Any) -> jax.Array:
    """1 where q == p, of kernels of shape (*window, q, c, p, f)."""
    return jnp.eye(n, dtype=dtype).reshape(n, 1, n, 1)


def _split_geometry(geometry: Geometry) -> tuple[Geometry, int, int]:
    """The geometry of a part, the number of parts, and how many groups each joins."""
    width = min(geometry.in_features, geometry.out_features) // geometry.groups
    joined = max(
        n
        for n in range(1, geometry.groups + 1)
        if geometry.groups % n == 0 and n * width <= max(_JOINED_FEATURES, width)
    )
    parts = geometry.groups // joined
    part = replace(
        geometry,
        in_features=geometry.in_features // parts,
        out_features=geometry.out_features // parts,
        groups=1,
    )
    return part, parts, joined


def _map_parts(
    f: Callable[[jax.Array, jax.Array], jax.Array], parts: int, a: jax.Array, b: jax.Array
) -> jax.Array:
    """A function of each part of the features, one after another."""
    if parts <= _MAX_UNROLLED_PARTS:
        split = (jnp.split(v, parts, axis=-1) for v in (a, b))
        return jnp.concatenate([f(*v) for v in zip(*split, strict=True)], axis=-1)
    apart = tuple(einops.rearrange(v, "... (q c) -> q ... c", q=parts) for v in (a, b))
    return einops.rearrange(lax.map(lambda v: f(*v), apart), "q ... f -> ... (q f)")
