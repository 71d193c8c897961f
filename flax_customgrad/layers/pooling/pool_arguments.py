"""`Pooling`: the windows of an image, and how the arguments of a pooling become them."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import lax

from flax_customgrad.layers.pooling.windows import Windows
from flax_customgrad.numerics.dtypes import takes_custom_backward

# How many slices are written out for each axis: with more of them a program takes long to compile.
_MAX_SLICES = 32

Padding = str | Sequence[tuple[int, int]]
"""SAME, SAME_LOWER, VALID, or the elements to add (before, after) each axis."""


@dataclass(frozen=True)
class Pooling:
    """The windows of an image; of each spatial axis one entry.

    Attributes:
        spatial_shape: the spatial shape of what is pooled.
        window_shape: elements of a window.
        strides: how far one window is from the next.
        padding: elements added (before, after); negative ones are taken away.
    """

    spatial_shape: tuple[int, ...]
    window_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @property
    def is_global(self) -> bool:
        """Whether the only window is the whole image."""
        return (
            bool(self.spatial_shape)
            and self.window_shape == self.spatial_shape
            and not any(map(any, self.padding))
        )

    @property
    def fits_slices(self) -> bool:
        """Whether there are windows, of a size to write out as slices."""
        axes = self.axes(1 + len(self.spatial_shape))
        return len(axes) > 0 and all(w.number > 0 and w.size <= _MAX_SLICES for w in axes)

    @property
    def out(self) -> tuple[int, ...]:
        """How many windows lie along each spatial axis."""
        return tuple(windows.number for windows in self.axes(1 + len(self.spatial_shape)))

    def axes(self, ndim: int) -> list[Windows]:
        """The windows along each spatial axis.

        Args:
            ndim: how many axes an array (..., *spatial, features) has.
        """
        front = ndim - 1 - len(self.spatial_shape)
        each = zip(self.spatial_shape, self.window_shape, self.strides, self.padding, strict=True)
        axes = [Windows(front + i, *entries) for i, entries in enumerate(each)]
        # A single window overlaps with none, whatever its stride.
        return [replace(w, stride=max(w.stride, w.size)) if w.number == 1 else w for w in axes]

    def reduce_window(
        self, x: jax.Array, init: Any, reduce_fn: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        """XLA's own operation, as flax.nnx calls it, for any number of batch axes.

        Args:
            x: array of shape (..., *spatial, features).
            init: what a reduction begins with.
            reduce_fn: reduces two arrays to one.
        """
        front = (1,) * (x.ndim - 1 - len(self.spatial_shape))
        none = ((0, 0),)
        return lax.reduce_window(
            x,
            init,
            reduce_fn,
            (*front, *self.window_shape, 1),
            (*front, *self.strides, 1),
            (*none * len(front), *self.padding, *none),
        )


def parse_pooling(inputs: Any, window_shape: Any, strides: Any, padding: Any) -> Pooling:
    """The windows that the arguments of a pooling describe.

    Args:
        inputs: array of shape (*batch, *spatial, features).
        window_shape: whole numbers, one for each spatial axis.
        strides: likewise; None or none for 1.
        padding: the name of a padding, or a pair of whole numbers for each spatial axis.

    Raises:
        TypeError: they are not of whole numbers.
        ValueError: they do not fit each other or the inputs.
    """
    window_shape = _parse_sizes("window_shape", window_shape)
    n = len(window_shape)
    strides = (None if strides is None else _parse_sizes("strides", strides)) or (1,) * n
    if len(strides) != n:
        raise ValueError(
            f"strides {strides} and window_shape {window_shape} differ in length: write one stride "
            f"for each axis of the window, {(2,) * n} say, or None for 1 along all"
        )
    if inputs.ndim < n + 1:
        raise ValueError(
            f"inputs of shape {inputs.shape} have {inputs.ndim} axes, too few for window_shape "
            f"{window_shape}: (*batch, *spatial, features) takes at least {n + 1}; write x[..., "
            "None] for inputs without an axis of features"
        )
    image = inputs.shape[inputs.ndim - 1 - n : -1]
    return Pooling(
        image, window_shape, strides, _parse_padding(padding, image, window_shape, strides)
    )


def _parse_sizes(name: str, sizes: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(map(operator.index, sizes))
    except TypeError:
        raise TypeError(
            f"{name} is {sizes!r}: write whole numbers, one for each spatial axis, (2, 2) for "
            "images"
        ) from None
    if any(size < 1 for size in sizes):
        raise ValueError(f"{name} is {sizes}: each number has to be at least 1")
    return sizes


def _parse_padding(
    padding: Any, image: tuple[int, ...], window_shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    n = len(window_shape)
    if isinstance(padding, str):
        names = ("SAME", "SAME_LOWER", "VALID")
        if padding.upper() not in names:
            raise ValueError(f"padding {padding!r} is none of {', '.join(names)}")
        pads = lax.padtype_to_pads(image, window_shape, strides, padding)
        return tuple((low, high) for low, high in pads)
    try:
        pads = tuple((operator.index(low), operator.index(high)) for low, high in padding)
    except (TypeError, ValueError):
        raise TypeError(
            f"padding is {padding!r}: write SAME, SAME_LOWER or VALID, or a pair (before, after) "
            f"for each axis of the window, {((1, 1),) * n} say"
        ) from None
    if len(pads) != n:
        raise ValueError(
            f"padding {pads} is not for each of the axes of window_shape {window_shape}: write a "
            f"pair (before, after) for each, {((1, 1),) * n} say"
        )
    return pads


def is_pooled_by_slices(inputs: Any, pooling: Pooling) -> bool:
    """Whether the hand-written backwards apply: floating images, and windows to write out.

    Args:
        inputs: array of shape (*batch, *spatial, features).
        pooling: the windows.
    """
    return takes_custom_backward(inputs) and inputs.size > 0 and pooling.fits_slices
