"""Patches: windows that do not overlap, and 1 x 1 ones above all, as one matrix product.

    y[n, o, f]         = sum_{t, c} x[n, o, t, c] w[t, c, f]
    dx[n, o, t, c]     = sum_f      g[n, o, f]    w[t, c, f]
    dW[t, c, f]        = sum_{n, o} x[n, o, t, c] g[n, o, f]

where x[n, o, t, c] is the padded input cut into blocks of one stride each, of which the window sees
the first elements. The spread input of the second map is the transposed geometry of the first.
"""

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.conv.recipes.geometry import Geometry, mirrored, padded


def fits(geometry: Geometry) -> bool:
    """Whether windows do not overlap, in the input or, spread out, in the output.

    Args:
        geometry: any.
    """
    return geometry.groups == 1 and (_cuts(geometry) or _cuts(geometry.transposed))


def _cuts(geometry: Geometry) -> bool:
    return all(d == 1 for d in geometry.input_dilation) and all(
        k == 1 or (k <= s and d == 1)
        for k, s, d in zip(geometry.window, geometry.strides, geometry.kernel_dilation, strict=True)
    )


def correlate(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """One product of the blocks with the kernel, or of the elements with the kernel into blocks.

    Args:
        x: array of shape (batch, *size, in_features).
        w: array of shape (*window, in_features, out_features).
        geometry: one that fits.
    """
    if _cuts(geometry):
        blocks = _blocks(x, geometry)
        axes = (*_inside(geometry), blocks.ndim - 1)
        return lax.dot_general(blocks, w, ((axes, range(w.ndim - 1)), ((), ())))
    back = geometry.transposed
    w = mirrored(w, 1)
    blocks = lax.dot_general(x, w, (((x.ndim - 1,), (w.ndim - 1,)), ((), ())))
    return _joined(blocks, back)


def kernel_gradient(x: jax.Array, g: jax.Array, geometry: Geometry) -> jax.Array:
    """One product of the blocks with g.

    Args:
        x: array of shape (batch, *size, in_features).
        g: array of shape (batch, *out, out_features).
        geometry: one that fits.

    Returns:
        Array of shape (*window, in_features, out_features).
    """
    if not _cuts(geometry):
        return mirrored(kernel_gradient(g, x, geometry.transposed), 1)
    blocks = _blocks(x, geometry)
    axes = (0, *_outside(geometry))
    return lax.dot_general(blocks, g, ((axes, range(g.ndim - 1)), ((), ())))


def _outside(geometry: Geometry) -> range:
    """The axes of an array of blocks that count blocks."""
    return range(1, 2 * geometry.rank, 2)


def _inside(geometry: Geometry) -> range:
    """The axes that count elements of a block."""
    return range(2, 2 * geometry.rank + 1, 2)


def _blocks(x: jax.Array, geometry: Geometry) -> jax.Array:
    """The input as (batch, o_1, t_1, o_2, t_2, ..., features)."""
    ends = [o * s for o, s in zip(geometry.out, geometry.strides, strict=True)]
    x = padded(x, geometry.padding_to(ends))
    shape = [n for pair in zip(geometry.out, geometry.strides, strict=True) for n in pair]
    blocks = x.reshape(x.shape[0], *shape, x.shape[-1])
    for axis, k in zip(_inside(geometry), geometry.window, strict=True):
        blocks = lax.slice_in_dim(blocks, 0, k, axis=axis)
    return blocks


def _joined(blocks: jax.Array, geometry: Geometry) -> jax.Array:
    """What `_blocks` made of an input again the input, from (batch, *out, *window, features)."""
    rank = geometry.rank
    gaps = [s - k for s, k in zip(geometry.strides, geometry.window, strict=True)]
    order = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
    blocks = lax.transpose(blocks, (0, *order, 2 * rank + 1))
    zero = jnp.zeros((), blocks.dtype)
    config = [(0, 0, 0), *(pair for gap in gaps for pair in ((0, 0, 0), (0, gap, 0))), (0, 0, 0)]
    blocks = lax.pad(blocks, zero, config)
    ends = [o * s for o, s in zip(geometry.out, geometry.strides, strict=True)]
    x = blocks.reshape(blocks.shape[0], *ends, blocks.shape[-1])
    return padded(x, tuple((-low, -high) for low, high in geometry.padding_to(ends)))
