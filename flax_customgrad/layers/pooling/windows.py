"""Windows along one axis: what they see, and what they send back.

Of elements with `low` elements of padding before them, windows of size `k` and stride `s` see

    window o at offset t         element o s + t - low,                  t = 0 .. k-1
    element q s + r - low        at offset r + j s of window q - j,      r = 0 .. s-1, j = 0 .. J-1

`J`, which is `k / s` rounded up, is how many windows see an element at most. What an element gets
from those that see it is combined from windows as well, of size `J` and stride 1, each of which
yields a block of `s` elements. An image is combined along one axis after the other.

What all windows see at one offset is a slice. XLA on a CPU makes vector code of a few slices and
their maximum or sum, but one scalar loop of `reduce_window`. Windows that reach into the padding
are combined separately from the others and put next to them: a padded copy of the image would take
nearly as long to make as all the rest.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PaddedArray = tuple[jax.Array, float]
"""An array, and what its padding holds."""

Continuation = Callable[[jax.Array], jax.Array]
"""What is done to each part of an array that is combined: the steps along the other axes."""

# Of windows up to this size all elements are read at once. Of larger ones an axis is combined and
# stored before the next: 5+5 elements are read instead of 25, and XLA has as much less to compile.
_MAX_READ_AT_ONCE = 9


@dataclass(frozen=True)
class Windows:
    """Windows along one axis.

    Attributes:
        axis: the axis, counted from the front.
        length: how many elements it has.
        size: elements of a window.
        stride: how far one window is from the next.
        padding: elements added (before, after); negative ones are taken away.
    """

    axis: int
    length: int
    size: int
    stride: int
    padding: tuple[int, int]

    @property
    def number(self) -> int:
        """How many windows there are."""
        return max(0, (self.length + sum(self.padding) - self.size) // self.stride + 1)

    @property
    def overlap(self) -> int:
        """How many windows see an element at most."""
        return -(-self.size // self.stride)

    def combine(
        self, f: Callable[..., jax.Array], *images: PaddedArray, separate_edges: bool = True
    ) -> jax.Array:
        """Combines what each window sees.

        Args:
            f: makes one array of what windows see. It gets a list for each image, of the slices at
                offset 0, at offset 1, and so on.
            *images: arrays, each with what its padding holds.
            separate_edges: whether windows that reach into the padding are combined separately, for
                which XLA compiles f three times; or the images are padded.

        Returns:
            What f makes, with the windows in the place of the elements.
        """
        low = self.padding[0]
        first = min(self.number, max(0, -(-low // self.stride)))
        last = (self.length + low - self.size) // self.stride + 1
        last = max(first, min(self.number, last))
        parts = (
            [(0, first), (first, last), (last, self.number)]
            if separate_edges
            else [(0, self.number)]
        )
        made = [
            f(*(self._slices(*image, *part) for image in images))
            for part in parts
            if part[0] < part[1]
        ]
        return made[0] if len(made) == 1 else lax.concatenate(made, self.axis)

    def scatter(
        self,
        g: jax.Array,
        offset: jax.Array | None = None,
        then: Continuation = lambda dx: dx,
    ) -> jax.Array:
        """Adds up what each element gets from the windows that see it.

        Args:
            g: what each window sends.
            offset: the one offset to which each window sends it, in float32; None for all offsets.
            then: what is done to each part of the result.

        Returns:
            An array with the elements in the place of the windows.
        """
        low, s, ahead = self.padding[0], self.stride, self.overlap - 1
        first, stop = low // s, -(-(low + self.length) // s)
        blocks = Windows(
            self.axis, self.number, self.overlap, 1, (ahead - first, stop - self.number)
        )
        images = [(sent, 0.0) for sent in (g, offset) if sent is not None]
        separate_edges = offset is None or self.separates_edges
        dx = blocks.combine(
            lambda *sent: then(self._block(*sent)), *images, separate_edges=separate_edges
        )
        return self._padded(dx, first * s - low, low + self.length - stop * s, 0)

    @property
    def separates_edges(self) -> bool:
        """Whether windows that reach into the padding are worth a program of their own.

        For a sum they always are.
        """
        return self.size <= 3

    def _slices(self, image: jax.Array, fill: float, first: int, stop: int) -> list[jax.Array]:
        """What the windows from first to stop - 1 see at each offset."""
        span = (stop - first - 1) * self.stride + 1
        begin = first * self.stride - self.padding[0]
        end = begin + span + self.size - 1
        there = [min(max(i, 0), self.length) for i in (begin, end)]
        before = min(max(-begin, 0), end - begin)
        after = end - begin - before - (there[1] - there[0])
        image = lax.slice_in_dim(image, *there, axis=self.axis)
        image = self._padded(image, before, after, fill)
        return [
            lax.slice_in_dim(image, t, t + span, self.stride, self.axis) for t in range(self.size)
        ]

    def _block(self, sent: list[jax.Array], offset: list[jax.Array] | None = None) -> jax.Array:
        """The s elements of each q, from what the windows q - J + 1 to q send."""
        parts: list[Any] = []
        for j, g in enumerate(reversed(sent)):
            here = np.arange(j * self.stride, (j + 1) * self.stride, dtype=np.float32)
            here = here.reshape(-1, *[1] * (g.ndim - self.axis - 1))
            g = lax.expand_dims(g, [self.axis + 1])
            if offset is not None:
                wanted = lax.expand_dims(offset[-1 - j], [self.axis + 1])
                g = jnp.where(wanted == here, g, 0)
            elif here.max() >= self.size:
                g = jnp.where(here < self.size, g, 0)
            parts.append(g)
        block = functools.reduce(lax.add, parts)
        shape = (*block.shape[: self.axis + 1], self.stride, *block.shape[self.axis + 2 :])
        return lax.collapse(jnp.broadcast_to(block, shape), self.axis, self.axis + 2)

    def _padded(self, x: jax.Array, before: int, after: int, fill: float) -> jax.Array:
        if before == after == 0:
            return x
        config = [(0, 0, 0)] * x.ndim
        config[self.axis] = (before, after, 0)
        return lax.pad(x, jnp.asarray(fill, x.dtype), config)


def apply_along_axes(
    axes: Sequence[Windows],
    step: Callable[[Windows, jax.Array, Continuation], jax.Array],
    x: jax.Array,
) -> jax.Array:
    """Takes a step along one axis after the other.

    Args:
        axes: the windows along each axis.
        step: combines an array along one of them; the last argument is what is then to be done to
            each part that it makes.
        x: the array to begin with.
    """
    if not axes:
        return x
    here, *others = axes
    then = functools.partial(apply_along_axes, others, step)
    if math.prod(windows.size for windows in axes) <= _MAX_READ_AT_ONCE:
        return step(here, x, then)
    return then(step(here, x, lambda x: x))
