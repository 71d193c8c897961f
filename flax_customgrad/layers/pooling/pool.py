"""pool: the reduction of each window by any function, as in flax.nnx, of images of any dimension.

Maxima, minima and sums of real floating images have a backward of their own, in `max_pool` and
`avg_pool`. Everything else is computed as in flax.nnx, and JAX differentiates that: integers and
complex numbers, other reductions, images too small for a window or of symbolic size, and windows
that are too large to be written out as slices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax

from flax_customgrad.layers.drop_in import has_known_size
from flax_customgrad.layers.pooling.avg_pool import is_pooled_by_sums, sum_pool
from flax_customgrad.layers.pooling.max_pool import MAX, MIN, extreme_pool
from flax_customgrad.layers.pooling.pool_arguments import (
    Padding,
    is_pooled_by_slices,
    parse_pooling,
)
from flax_customgrad.numerics.dtypes import as_array

_of_nnx = nnx.pool
"""The function of nnx, whose name a user may give to ours."""


def pool(
    inputs: jax.Array,
    init: Any,
    reduce_fn: Callable[[jax.Array, jax.Array], jax.Array],
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: Padding,
) -> jax.Array:
    """The reduction of each window by a function.

    Maxima, minima and sums are `max_pool`, `min_pool` and a sum with the backward of `avg_pool`:
    `jax.lax.max` from minus infinity, `jax.lax.min` from infinity, and `jax.lax.add` from 0. With
    another function or beginning it is `flax.nnx.pool`.

    Args:
        inputs: array of shape (*batch, *spatial, features).
        init: what a reduction begins with, and what the padding holds.
        reduce_fn: reduces two arrays to one; associative.
        window_shape: the size of a window along each spatial axis.
        strides: how far one window is from the next; None for 1.
        padding: as for `max_pool`.

    Returns:
        Array of shape (*batch, *windows, features), of the dtype of the inputs.

    Raises:
        TypeError: an argument is not of whole numbers.
        ValueError: the arguments do not fit each other or the inputs.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.pool(jnp.ones((4, 1)), 0.0, jax.lax.add, (3,), None, "SAME")[:, 0]
        Array([2., 3., 3., 2.], dtype=float32)
    """
    inputs = as_array(inputs)
    if not has_known_size(inputs, np.size(window_shape)):
        return _of_nnx(inputs, init, reduce_fn, window_shape, strides, padding)
    pooling = parse_pooling(inputs, window_shape, strides, padding)
    begin = float(init) if isinstance(init, int | float | np.number) else None
    for extreme in (MAX, MIN):
        is_extreme = reduce_fn is extreme.reduce_fn and begin == extreme.identity
        if is_extreme and is_pooled_by_slices(inputs, pooling):
            return extreme_pool(inputs, pooling, extreme)
    if reduce_fn is lax.add and begin == 0 and is_pooled_by_sums(inputs, pooling):
        return sum_pool(inputs, pooling, "one", inputs.dtype)
    return pooling.reduce_window(inputs, init, reduce_fn)
