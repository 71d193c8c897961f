"""Patches: windows that do not overlap, and 1 x 1 ones above all, as one matrix product.

    y[n, o, f]     = sum_{t, c} x[n, o, t, c] w[t, c, f]
    dx[n, o, t, c] = sum_f      g[n, o, f]    w[t, c, f]
    dw[t, c, f]    = sum_{n, o} x[n, o, t, c] g[n, o, f]

where `x[n, o, t, c]` is the padded input cut into blocks of one stride each, of which the window
sees the first elements. The second map, whose input is dilated, is of the transposed geometry of
the first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.conv.geometry import Geometry, mirror_kernel, pad_space
from flax_customgrad.layers.conv.lowerings.lowering import Lowering
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.row_products import sum_over_rows


class PatchLowering(Lowering):
    """One matrix product of blocks."""

    def fits(self, geometry: Geometry) -> bool:
        """Whether windows do not overlap, in the input or, dilated, in the output."""
        return geometry.groups == 1 and (_cuts_input(geometry) or _cuts_input(geometry.transposed))

    def correlate(self, x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
        """The product of blocks with the kernel, or of elements with the kernel into blocks."""
        if _cuts_input(geometry):
            blocks, w = _cut_blocks(x, geometry), _merge_last(w)
            axes = _element_axes(geometry), range(geometry.rank)
            return _product(blocks, w, axes)
        w = _merge_last(mirror_kernel(w, 1))
        blocks = _product(x, w, ([x.ndim - 1], [w.ndim - 1]))
        return _join_blocks(blocks, geometry.transposed)

    def kernel_gradient(self, x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
        """One product of the blocks with g."""
        if not _cuts_input(geometry):
            return mirror_kernel(self.kernel_gradient(g, x, geometry.transposed), 1)
        blocks = _cut_blocks(x, geometry)
        rows = (0, *_block_axes(geometry))
        dw = sum_over_rows(blocks, g, rows, range(g.ndim - 1), accumulator(blocks))
        return dw.reshape(*geometry.window, geometry.in_features, geometry.out_features)


def _product(a: jax.Array, b: jax.Array, axes: Any) -> jax.Array:
    """The product over some axes of each, in float32 or wider."""
    return lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=accumulator(a, b))


def _cuts_input(geometry: Geometry) -> bool:
    """Whether the input falls into blocks, one for each window."""
    return all(d == 1 for d in geometry.input_dilation) and all(
        k == 1 or (k <= s and d == 1)
        for k, s, d in zip(geometry.window, geometry.strides, geometry.kernel_dilation, strict=True)
    )


def _block_axes(geometry: Geometry) -> range:
    """The axes of an array of blocks that count blocks."""
    return range(1, 2 * geometry.rank, 2)


def _element_axes(geometry: Geometry) -> range:
    """The axes that count elements of a block."""
    return range(2, 2 * geometry.rank + 1, 2)


def _merge_last(w: jax.Array) -> jax.Array:
    """A kernel with its last axis of space and the next one as one."""
    *window, k, n, m = w.shape
    return w.reshape(*window, k * n, m)


def _cut_blocks(x: jax.Array, geometry: Geometry) -> jax.Array:
    """The input as (batch, o_1, t_1, o_2, t_2, ..., o_r, t_r features).

    As two axes t_r and the features would have XLA turn blocks number by number: 3 features of a
    16 x 16 patch take three times as long.
    """
    size = [o * s for o, s in zip(geometry.out, geometry.strides, strict=True)]
    x = pad_space(x, geometry.padding_to_size(size))
    shape = [n for pair in zip(geometry.out, geometry.strides, strict=True) for n in pair]
    blocks = x.reshape(x.shape[0], *shape[:-1], shape[-1] * x.shape[-1])
    *window, last = geometry.window
    window.append(last * x.shape[-1])
    for axis, k in zip(_element_axes(geometry), window, strict=True):
        blocks = lax.slice_in_dim(blocks, 0, k, axis=axis)
    return blocks


def _join_blocks(blocks: jax.Array, geometry: Geometry) -> jax.Array:
    """The inverse of `_cut_blocks`, from (batch, *out, *window[:-1], t_r features)."""
    rank, features = geometry.rank, geometry.in_features
    *gaps, last = (s - k for s, k in zip(geometry.strides, geometry.window, strict=True))
    gaps.append(last * features)
    order = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
    blocks = lax.transpose(blocks, (0, *order))
    zero = jnp.zeros((), blocks.dtype)
    config = [(0, 0, 0), *(pair for gap in gaps for pair in ((0, 0, 0), (0, gap, 0)))]
    blocks = lax.pad(blocks, zero, config)
    size = [o * s for o, s in zip(geometry.out, geometry.strides, strict=True)]
    x = blocks.reshape(blocks.shape[0], *size, features)
    return pad_space(x, tuple((-low, -high) for low, high in geometry.padding_to_size(size)))
