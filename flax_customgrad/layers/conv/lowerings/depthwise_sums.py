"""The sums of a depthwise kernel's gradient: for each element of the window, what it sees times g.

    s[t, c] = sum_{n, o} x[n, o s + t d - low, c] g[n, o, c]

A sum over images and space into k arrays of features has no vector code in XLA on a CPU. So it is
taken in two steps: blocks of 16 elements are added up by sums that are written out, which XLA turns
into vector code along the features, and the rest, a sixteenth, is reduced. A loop over images keeps
what is read k times in the cache: 2 ms instead of 8 for a 3x3 window over 16x32x32x128 on two
cores, of which JAX's own convolution takes 33.

Each sum written out is compiled by itself, in 25 ms. So a window of many elements is gone through
in a loop, which compiles one sum and runs half as fast. One `lax.reduce` with an operand for each
element runs half as fast again; it compiles in a fifth of the time, and serves small arrays.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.conv.geometry import Geometry, pad_space
from flax_customgrad.numerics.accumulation import fusion_barrier

_CACHE_BYTES = 1 << 19


def sum_all_at_once(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """One reduction with an operand for each element of the window.

    Args:
        x: array of shape (batch, *size, features).
        g: array of shape (batch, *out, features).
        geometry: where the windows lie.

    Returns:
        Array of shape (elements of the window, features).
    """
    x = geometry.pad(x)
    products = [geometry.slice_at(tap, x) * g for tap in geometry.taps]
    zeros = [jnp.zeros((), g.dtype)] * len(products)

    def add(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return jnp.stack(lax.reduce(products, zeros, add, tuple(range(g.ndim - 1))))


def sum_by_blocks(
    x: jax.Array, g: jax.Array, geometry: Geometry, in_loop: bool = False
) -> jax.Array:
    """Sums over blocks written out, in a loop over images, and a reduction of what is left.

    Args:
        x: array of shape (batch, *size, features).
        g: array of shape (batch, *out, features).
        geometry: where the windows lie.
        in_loop: whether the elements of the window are gone through in a loop.

    Returns:
        Array of shape (elements of the window, features).
    """
    counts, block = _block_counts_and_shape(geometry.out)
    out = [n * b for n, b in zip(counts, block, strict=True)]
    firsts = [
        [t * d for t, d in zip(tap, geometry.kernel_dilation, strict=True)] for tap in geometry.taps
    ]
    x_padding = geometry.padding_to_size(geometry.receptive_size(out))
    g_padding = tuple((0, e - o) for e, o in zip(out, geometry.out, strict=True))

    def strided(a: jax.Array, start: list[int], step: list[int]) -> jax.Array:
        stop = [i + (n - 1) * s + 1 for i, n, s in zip(start, counts, step, strict=True)]
        return lax.slice(a, (0, *start, 0), (a.shape[0], *stop, a.shape[-1]), (1, *step, 1))

    def block_sum(x: jax.Array, g: jax.Array, first: list[int]) -> jax.Array:
        """The sum over each block, (images, *counts, features), of what is seen from `first`."""
        steps = [b * s for b, s in zip(block, geometry.strides, strict=True)]
        products = []
        for at in itertools.product(*map(range, block)):
            start = [f + i * s for f, i, s in zip(first, at, geometry.strides, strict=True)]
            products.append(strided(x, start, steps) * strided(g, list(at), list(block)))
        return functools.reduce(jnp.add, products)

    def block_sums(x: jax.Array, g: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        """That for each element of the window."""
        x, g = pad_space(x, x_padding), pad_space(g, g_padding)
        if not in_loop:
            return tuple(fusion_barrier(block_sum(x, g, first)) for first in firsts)
        seen = (len(x), *[(o - 1) * s + 1 for o, s in zip(out, geometry.strides, strict=True)])

        def of_element(first: jax.Array) -> jax.Array:
            window = lax.dynamic_slice(x, (0, *first, 0), (*seen, x.shape[-1]))
            return block_sum(window, g, [0] * len(out))

        return lax.map(of_element, jnp.array(firsts))

    def sums_in_loop(images: int) -> Any:
        def add_images(i: int, sums: Any) -> Any:
            some = (lax.dynamic_slice_in_dim(a, i * images, images) for a in (x, g))
            return jax.tree.map(jnp.add, sums, block_sums(*some))

        zeros = jnp.zeros_like(x, shape=(images, *counts, x.shape[-1]))
        start = jnp.stack([zeros] * len(firsts)) if in_loop else (zeros,) * len(firsts)
        return lax.fori_loop(0, x.shape[0] // images, add_images, start)

    images = _images_per_iteration(x, g)
    parts = block_sums(x, g) if images is None else sums_in_loop(images)
    axes = tuple(range(g.ndim - 1))
    return jnp.stack([lax.reduce_sum(part, axes) for part in parts])


def _block_counts_and_shape(out: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """How many blocks lie along each axis, and of how many elements: 16 in all, last axes first."""
    wanted = {1: (16,), 2: (4, 4)}.get(len(out), (*(1,) * (len(out) - 3), 2, 2, 4))
    counts = [-(-o // b) for o, b in zip(out, wanted, strict=True)]
    return counts, [-(-o // n) for o, n in zip(out, counts, strict=True)]


def _images_per_iteration(x: jax.Array, g: jax.Array) -> int | None:
    """How many images an iteration takes, without a remainder; None where no loop is needed.

    That is as many as the cache holds. A batch of symbolic size is taken as one.
    """
    batch = x.shape[0]
    if not isinstance(batch, int):
        return None
    wanted = max(1, _CACHE_BYTES * batch // max(1, max(x.nbytes, g.nbytes)))
    images = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= wanted)
    return None if images == batch else images
