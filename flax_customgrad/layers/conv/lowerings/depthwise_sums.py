"""The sums of a depthwise kernel's gradient: for each element of the window, what it sees times g.

    s[t, c] = sum_{n, o} x[n, o s + t d - low, c] g[n, o, c]

A sum over images and space into k arrays of features has no vector code in XLA on a CPU. So it is
taken in two steps: blocks of 16 elements are added up by sums that are written out, which XLA turns
into vector code along the features, and the rest, a sixteenth, is reduced. A loop over images keeps
what is read k times in the cache: 2 ms instead of 8 for a 3x3 window over 16x32x32x128 on two
cores, of which JAX's own convolution takes 33.

Each sum written out is compiled by itself, in 25 ms. One `lax.reduce` with an operand for each
element of the window compiles in a fifth of that time and runs 2 to 3 times slower, but of small
arrays 4 times faster. With an operand for each column of the window alone, over all of its rows, it
reads the input once for each row, and compiles in a third of the time.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.conv.geometry import Geometry, pad_once, pad_space
from flax_customgrad.numerics.accumulation import fusion_barrier
from flax_customgrad.numerics.unfused import unfused

_CACHE_BYTES = 1 << 19

# XLA on a CPU compiles a concatenation anew wherever it stands: 20 ms for 25 arrays, 60 for 49.
_MAX_CONCATENATED = 32


@unfused(static_argnums=2)
def sum_all_at_once(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """One reduction with an operand for each element of the window.

    Args:
        x: array of shape (batch, *size, features).
        g: array of shape (batch, *out, features).
        geometry: where the windows lie.

    Returns:
        Array of shape (elements of the window, features).
    """
    x, (geometry,) = pad_once(x, [geometry])
    x = geometry.pad(x)
    row, parts = geometry.rows(x)
    rows = [_row_products(part, g, row) for part in parts]
    products = list(itertools.chain(*rows))
    sums = _sums(products, range(g.ndim - 1))
    if len(sums) <= _MAX_CONCATENATED:
        return jnp.stack(sums)
    left = iter(sums)
    # Barrier: keeps the rows apart, so that one kernel stacks each of them.
    rows = lax.optimization_barrier([_stack(list(itertools.islice(left, len(r)))) for r in rows])
    return _stack(rows).reshape(len(sums), g.shape[-1])


@unfused(static_argnums=2)
def sum_by_rows(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """One reduction with an operand for each element of a row of the window, over all rows.

    Args:
        x: array of shape (batch, *size, features).
        g: array of shape (batch, *out, features).
        geometry: where the windows lie.

    Returns:
        Array of shape (elements of the window, features).
    """
    x, (geometry,) = pad_once(x, [geometry])
    row, seen = geometry.overlapping_rows(geometry.pad(x))
    batch, k = seen.shape[:2]
    g = lax.broadcast_in_dim(g, (batch, k, *g.shape[1:]), (0, *range(2, g.ndim + 1)))
    as_images = [a.reshape(batch * k, *a.shape[2:]) for a in (seen, g)]
    products = [a.reshape(g.shape) for a in _row_products(*as_images, row)]
    sums = _stack(_sums(products, (0, *range(2, g.ndim - 1))))
    return lax.transpose(sums, (1, 0, 2)).reshape(-1, g.shape[-1])


def _sums(arrays: list[jax.Array], axes: Sequence[int]) -> list[jax.Array]:
    """The sums of several arrays, in one reduction."""

    def add(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(map(lax.add, left, right))

    zeros = [jnp.zeros((), a.dtype) for a in arrays]
    return list(lax.reduce(arrays, zeros, add, tuple(axes)))


# XLA inlines the call; JAX traces and lowers it once for all rows of a window.
@functools.partial(jax.jit, static_argnums=2)
def _row_products(x: jax.Array, g: jax.Array, geometry: Geometry) -> list[jax.Array]:
    """For each element of one row of the window, what it sees times g."""
    return [lax.mul(geometry.slice_at(tap, x), g) for tap in geometry.taps]


@jax.jit
def _stack(parts: list[jax.Array]) -> jax.Array:
    """Arrays of one shape along a new first axis, as the sum of what is padded with zeros.

    XLA on a CPU compiles equal fusions once.
    """
    zero, n = jnp.zeros((), parts[0].dtype), len(parts)

    def in_place(i: int, part: jax.Array) -> jax.Array:
        rest = [(0, 0, 0)] * part.ndim
        return lax.pad(lax.expand_dims(part, [0]), zero, [(i, n - 1 - i, 0), *rest])

    return functools.reduce(lax.add, map(in_place, range(n), parts))


@unfused(static_argnums=2)
def sum_by_blocks(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """Sums over blocks written out, in a loop over images, and a reduction of what is left.

    Args:
        x: array of shape (batch, *size, features).
        g: array of shape (batch, *out, features).
        geometry: where the windows lie.

    Returns:
        Array of shape (elements of the window, features).
    """
    counts, block = _block_counts_and_shape(geometry.out)
    out = [n * b for n, b in zip(counts, block, strict=True)]
    x_padding = geometry.padding_to_size(geometry.receptive_size(out))
    g_padding = tuple((0, e - o) for e, o in zip(out, geometry.out, strict=True))

    def strided(a: jax.Array, start: tuple[int, ...], step: list[int]) -> jax.Array:
        stop = [i + (n - 1) * s + 1 for i, n, s in zip(start, counts, step, strict=True)]
        return lax.slice(a, (0, *start, 0), (a.shape[0], *stop, a.shape[-1]), (1, *step, 1))

    def block_sums(x: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        """For each element of the window the sum over each block, (images, *counts, features)."""
        x, g = pad_space(x, x_padding), pad_space(g, g_padding)
        steps = [b * s for b, s in zip(block, geometry.strides, strict=True)]
        places = list(itertools.product(*map(range, block)))
        # What one element of the window sees in a place another one sees elsewhere.
        seen = functools.cache(lambda *start: strided(x, start, steps))
        cotangents = [strided(g, at, list(block)) for at in places]

        def start(at: tuple[int, ...], tap: tuple[int, ...]) -> list[int]:
            offset = zip(at, geometry.strides, tap, geometry.kernel_dilation, strict=True)
            return [i * s + t * d for i, s, t, d in offset]

        return tuple(
            _sum_of_products([seen(*start(at, tap)) for at in places], cotangents)
            for tap in geometry.taps
        )

    def sums_in_loop(images: int) -> tuple[jax.Array, ...]:
        def add_images(i: int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            some = (lax.dynamic_slice_in_dim(a, i * images, images) for a in (x, g))
            return tuple(map(lax.add, sums, block_sums(*some)))

        shape = (images, *counts, x.shape[-1])
        zeros = tuple(jnp.zeros_like(x, shape=shape) for _ in geometry.taps)
        return lax.fori_loop(0, x.shape[0] // images, add_images, zeros)

    images = _images_per_iteration(x, g)
    parts = block_sums(x, g) if images is None else sums_in_loop(images)
    axes = tuple(range(g.ndim - 1))
    return jnp.stack([lax.reduce_sum(part, axes) for part in parts])


# XLA inlines the call; JAX traces and lowers it once for all elements of a window.
@jax.jit
def _sum_of_products(left: list[jax.Array], right: list[jax.Array]) -> jax.Array:
    return fusion_barrier(functools.reduce(lax.add, map(lax.mul, left, right)))


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
