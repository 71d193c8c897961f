"""max_pool, min_pool, avg_pool and pool: the functions of flax.nnx, of images of any dimension.

Maxima, minima and sums of real floating images have a backward of their own, in `max_pool` and
`avg_pool`. Everything else is computed as in flax.nnx, and JAX differentiates that: integers and
complex numbers, other reductions, images too small for a window, and windows that are too large to
be written out as slices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_customgrad.layers.pooling.avg_pool import sum_pool
from flax_customgrad.layers.pooling.max_pool import MAX, MIN, extreme_pool
from flax_customgrad.layers.pooling.pool_arguments import Pooling, windows_of
from flax_customgrad.numerics.dtypes import as_array, takes_custom_backward

Padding = str | Sequence[tuple[int, int]]
"""SAME, SAME_LOWER, VALID, or the elements to add (before, after) each axis."""


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """The largest element of each window.

    Of several equal ones the first gets the gradient, as in flax.nnx. Padding holds minus infinity.

    Args:
        inputs: array of shape (*batch, *spatial, features), with any number of batch axes, or none.
        window_shape: the size of a window along each spatial axis.
        strides: how far one window is from the next along each spatial axis; 1 by default.
        padding: "SAME", "SAME_LOWER" or "VALID", or for each spatial axis a pair of numbers, how
            many elements are added before and after it.

    Returns:
        Array of shape (*batch, *windows, features), of the dtype of the inputs.

    Raises:
        TypeError: an argument is not of whole numbers.
        ValueError: the arguments do not fit each other or the inputs; the error says what would.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> images = jnp.arange(16.0).reshape(1, 4, 4, 1)
        >>> fcg.max_pool(images, (2, 2), strides=(2, 2))[0, :, :, 0]
        Array([[ 5.,  7.],
               [13., 15.]], dtype=float32)
    """
    return pool(inputs, -np.inf, lax.max, window_shape, strides, padding)


def min_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
) -> jax.Array:
    """The smallest element of each window; otherwise as `max_pool`, with infinity for padding.

    Args:
        inputs: array of shape (*batch, *spatial, features).
        window_shape: the size of a window along each spatial axis.
        strides: how far one window is from the next; 1 by default.
        padding: as for `max_pool`.

    Returns:
        Array of shape (*batch, *windows, features), of the dtype of the inputs.

    Raises:
        TypeError: an argument is not of whole numbers.
        ValueError: the arguments do not fit each other or the inputs.
    """
    return pool(inputs, np.inf, lax.min, window_shape, strides, padding)


def avg_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> jax.Array:
    """The average of each window.

    Args:
        inputs: array of shape (*batch, *spatial, features).
        window_shape: the size of a window along each spatial axis.
        strides: how far one window is from the next; 1 by default.
        padding: as for `max_pool`.
        count_include_pad: whether elements of the padding count, which are 0.

    Returns:
        Array of shape (*batch, *windows, features), of the dtype of the inputs; with
        `count_include_pad=False` of float32 or a wider one, as in flax.nnx.

    Raises:
        TypeError: an argument is not of whole numbers.
        ValueError: the arguments do not fit each other or the inputs.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> signal = jnp.array([[1.0], [2.0], [6.0]])
        >>> fcg.avg_pool(signal, (3,), padding="SAME", count_include_pad=False)[:, 0]
        Array([1.5, 3. , 4. ], dtype=float32)
    """
    inputs = as_array(inputs)
    pooling = windows_of(inputs, window_shape, strides, padding)
    if not _is_summed(inputs, pooling):
        y = pooling.reduce_window(inputs, 0.0, lax.add)
        if count_include_pad:
            return y / np.prod(window_shape)
        ones = jnp.ones((*(1,) * (inputs.ndim - 1 - len(pooling.image)), *pooling.image, 1))
        return y / pooling.reduce_window(ones, 0.0, lax.add)
    if count_include_pad:
        return sum_pool(inputs, pooling, "size", inputs.dtype)
    # nnx counts in the default dtype.
    dtype = jnp.promote_types(inputs.dtype, jnp.result_type(float))
    return sum_pool(inputs, pooling, "inside", dtype)


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
    pooling = windows_of(inputs, window_shape, strides, padding)
    begin = float(init) if isinstance(init, int | float | np.number) else None
    for extreme in (MAX, MIN):
        if reduce_fn is extreme.of and begin == extreme.identity and _is_sliced(inputs, pooling):
            return extreme_pool(inputs, pooling, extreme)
    if reduce_fn is lax.add and begin == 0 and _is_summed(inputs, pooling):
        return sum_pool(inputs, pooling, "nothing", inputs.dtype)
    return pooling.reduce_window(inputs, init, reduce_fn)


def _is_sliced(inputs: Any, pooling: Pooling) -> bool:
    return takes_custom_backward(inputs) and inputs.size > 0 and pooling.is_sliced


def _is_summed(inputs: Any, pooling: Pooling) -> bool:
    return _is_sliced(inputs, pooling) or (
        takes_custom_backward(inputs) and inputs.size > 0 and pooling.is_whole
    )
