"""`Geometry`: where the windows of a convolution lie, and those of its transpose.

Every pass of a convolution layer is one of two maps of arrays laid out (batch, *space, features):

    correlate        y[o]  = sum_t x[o stride + t dilation - low] . w[t]
    kernel_gradient  dw[t] = sum_o x[o stride + t dilation - low] g[o]

where `t` runs over the window, and x may be dilated: its elements have zeros in between
(`input_dilation`). The gradient of the input is a `correlate` of g with the mirrored kernel:
strides and input dilation change places, and so do the features. A transposed convolution is a
`correlate` whose input dilation is its strides.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.numerics.unfused import unfused


@dataclass(frozen=True)
class Geometry:
    """What a convolution is, but for its batch and its dtype; one number per axis of space.

    Attributes:
        size: extent of the input.
        window: extent of the kernel.
        in_features: features of the input.
        out_features: features of the output.
        strides: steps between windows.
        padding: (low, high) zeros around the dilated input; negative ones cut off.
        input_dilation: steps between the elements of the input.
        kernel_dilation: steps between the elements of the window.
        groups: how many groups of features have nothing to do with each other.
    """

    size: tuple[int, ...]
    window: tuple[int, ...]
    in_features: int
    out_features: int
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int = 1

    @property
    def rank(self) -> int:
        """The number of axes of space."""
        return len(self.size)

    @functools.cached_property
    def out(self) -> tuple[int, ...]:
        """Extent of the output."""
        padded = (
            dilated_size(n, d) + low + high
            for n, d, (low, high) in zip(self.size, self.input_dilation, self.padding, strict=True)
        )
        return tuple(
            max(0, (n - dilated_size(k, d)) // s + 1)
            for n, k, d, s in zip(
                padded, self.window, self.kernel_dilation, self.strides, strict=True
            )
        )

    @property
    def transposed(self) -> "Geometry":
        """The geometry of the map from g to dx, whose kernel is `mirror_kernel`."""
        padding = []
        for axis, (low, _) in enumerate(self.padding):
            before = dilated_size(self.window[axis], self.kernel_dilation[axis]) - low - 1
            into = dilated_size(self.size[axis], self.input_dilation[axis])
            reach = dilated_size(self.out[axis], self.strides[axis])
            padding.append((before, into + low - reach))
        return replace(
            self,
            size=self.out,
            in_features=self.out_features,
            out_features=self.in_features,
            strides=self.input_dilation,
            padding=tuple(padding),
            input_dilation=self.strides,
        )

    @property
    def is_dense(self) -> bool:
        """Whether all features meet, at places of the input and not at zeros that spread it."""
        return self.groups == 1 and all(d == 1 for d in self.input_dilation)

    @property
    def is_depthwise(self) -> bool:
        """Whether groups are too narrow for a product of matrices."""
        return self.in_features * self.out_features // self.groups**2 <= 4

    @property
    def taps(self) -> Iterator[tuple[int, ...]]:
        """The elements of the window, in the order of the kernel."""
        return itertools.product(*map(range, self.window))

    def pad(self, x: jax.Array) -> jax.Array:
        """The input with its padding.

        Args:
            x: array of shape (batch, *size, features).
        """
        return pad_space(x, self.padding)

    def receptive_size(self, out: Sequence[int]) -> tuple[int, ...]:
        """The extent of the padded input that some windows see, from the first one's first element.

        Args:
            out: how many windows lie along each axis.
        """
        return tuple(
            dilated_size(k, d) + dilated_size(o, s) - 1
            for k, d, o, s in zip(self.window, self.kernel_dilation, out, self.strides, strict=True)
        )

    def padding_to_size(self, size: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The padding that gives an input that is not dilated a size: low stays as it is.

        Args:
            size: what is wanted along each axis; less than there is cuts off.
        """
        return tuple(
            (low, wanted - n - low)
            for (low, _), wanted, n in zip(self.padding, size, self.size, strict=True)
        )

    def rows(self, x: jax.Array) -> tuple["Geometry", list[jax.Array]]:
        """The window as rows: the first axis of space holds what one of them sees.

        All rows are maps of one geometry, so that a function of one is traced once for all.

        Args:
            x: array of shape (batch, *size, features), padded and not dilated.

        Returns:
            The geometry of a row, and for each row of the window the part of x that it sees.
        """
        s, d = self.strides[0], self.kernel_dilation[0]
        n = dilated_size(self.out[0], s)
        parts = [
            lax.slice_in_dim(x, t * d, t * d + n, stride=s, axis=1) for t in range(self.window[0])
        ]
        return self._row(x), parts

    def overlapping_rows(self, x: jax.Array) -> tuple["Geometry", jax.Array]:
        """What `rows` returns, with the rows of the window along one axis of a single array.

        Copies of x end to end, cut into lengths of `d` more than x has, start `d` further in each:

            x_0 x_1 x_2 | x_0 x_1 x_2 | x_0 x_1 x_2 | ...
            x_0 x_1 x_2   x_0 | x_1 x_2   x_0 x_1 | x_2 ...          d = 1

        That is a matter of indices alone, which XLA fuses into whatever uses it.

        Args:
            x: array of shape (batch, *size, features), padded and not dilated.

        Returns:
            The geometry of a row, and an array of shape (batch, rows, out, *size[1:], features).
        """
        k, s, d = self.window[0], self.strides[0], self.kernel_dilation[0]
        batch, n, *rest = x.shape
        copies = -(-k * (n + d) // n)
        copied = lax.broadcast_in_dim(x, (batch, copies, n, *rest), (0, *range(2, x.ndim + 1)))
        end_to_end = copied.reshape(batch, copies * n, *rest)
        cut = lax.slice_in_dim(end_to_end, 0, k * (n + d), axis=1)
        cut = cut.reshape(batch, k, n + d, *rest)
        seen = lax.slice_in_dim(cut, 0, dilated_size(self.out[0], s), stride=s, axis=2)
        return self._row(x), seen

    def _row(self, x: jax.Array) -> "Geometry":
        """The geometry of one row of the window, on the part of a padded x that it sees."""
        return replace(
            self,
            size=(self.out[0], *x.shape[2:-1]),
            window=(1, *self.window[1:]),
            strides=(1, *self.strides[1:]),
            padding=((0, 0),) * self.rank,
            kernel_dilation=(1, *self.kernel_dilation[1:]),
        )

    def slice_at(self, tap: tuple[int, ...], x: jax.Array) -> jax.Array:
        """What one element of the window sees, of an input that is not dilated.

        Args:
            tap: the element.
            x: array of shape (batch, *size, features), padded.

        Returns:
            Array of shape (batch, *out, features).
        """
        start = [t * d for t, d in zip(tap, self.kernel_dilation, strict=True)]
        stop = [
            a + dilated_size(o, s) for a, o, s in zip(start, self.out, self.strides, strict=True)
        ]
        return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *self.strides, 1))


@dataclass(frozen=True)
class BoundaryPadding:
    """What is put around an image before it is convolved, and is not zeros.

    Attributes:
        mode: "wrap" or "reflect", of `jnp.pad`.
        pairs: how much, (low, high) for each axis of space.
    """

    mode: str
    pairs: tuple[tuple[int, int], ...]

    def padded_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The extent of an image with its boundary.

        Args:
            size: that of the image.
        """
        return tuple(n + low + high for n, (low, high) in zip(size, self.pairs, strict=True))

    def apply(self, x: jax.Array) -> jax.Array:
        """The image with its boundary.

        Args:
            x: array of shape (batch, *size, features).
        """
        return jnp.pad(x, [(0, 0), *self.pairs, (0, 0)], mode=self.mode)

    def transpose(self, g: jax.Array, x: jax.Array) -> jax.Array:
        """The gradient of `apply`: the boundary is added to where it was copied from.

        Args:
            g: cotangent of the padded image.
            x: the image, for its type, which is that of g.
        """
        return jax.linear_transpose(self.apply, x)(g)[0]


def dilated_size(n: int, dilation: int) -> int:
    """The extent of elements with zeros in between; of none it is 0.

    Args:
        n: how many elements.
        dilation: steps from one to the next.
    """
    return (n - 1) * dilation + 1 if n else 0


def pad_space(x: jax.Array, padding: tuple[tuple[int, int], ...]) -> jax.Array:
    """An array of shape (batch, *space, features) with zeros around it in space.

    Args:
        x: the array.
        padding: (low, high) for each axis of space; negative ones cut off.
    """
    if not any(map(any, padding)):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])


@unfused(static_argnums=1)
def stored_pad_space(x: jax.Array, padding: tuple[tuple[int, int], ...]) -> jax.Array:
    """What `pad_space` returns, computed once for all that use it.

    On one device it pads rows of numbers: with an axis for the features XLA on a CPU compiles a pad
    up to 5 times as long, 0.18 s for images of 28 x 28 x 64, and runs it a tenth slower. Several
    devices may split the features, and would have to gather them.

    Args:
        x: array of shape (batch, *space, features).
        padding: (low, high) for each axis of space, none of them negative.
    """
    if not any(map(any, padding)):
        return x
    if jax.device_count() > 1:
        return pad_space(x, padding)
    *leading, n, c = x.shape
    low, high = padding[-1]
    rows = x.reshape(*leading, n * c, 1)
    rows = pad_space(rows, (*padding[:-1], (low * c, high * c)))
    return rows.reshape(*rows.shape[:-2], n + low + high, c)


def pad_once(x: jax.Array, geometries: Sequence[Geometry]) -> tuple[jax.Array, list[Geometry]]:
    """An input with all the zeros that several maps of it need, stored, and those maps of it.

    Args:
        x: array of shape (batch, *size, features), not dilated.
        geometries: the maps, each of an input of that size.
    """
    sides = zip(*(itertools.chain(*geometry.padding) for geometry in geometries), strict=True)
    added = [max(0, *side) for side in sides]
    added = tuple(zip(added[::2], added[1::2], strict=True))

    def of_padded(geometry: Geometry) -> Geometry:
        axes = list(zip(geometry.size, geometry.padding, added, strict=True))
        return replace(
            geometry,
            size=tuple(n + low + high for n, _, (low, high) in axes),
            padding=tuple((a - low, b - high) for _, (a, b), (low, high) in axes),
        )

    return stored_pad_space(x, added), list(map(of_padded, geometries))


def mirror_kernel(kernel: jax.Array, groups: int) -> jax.Array:
    """The kernel of the transposed map: reversed in space, features of input and output swapped.

    Args:
        kernel: array of shape (*window, in_features // groups, out_features).
        groups: the number of groups.

    Returns:
        Array of shape (*window, out_features // groups, in_features).
    """
    *window, c, f = kernel.shape
    n = len(window)
    kernel = lax.rev(kernel, range(n)).reshape(*window, c, groups, f // groups)
    kernel = lax.transpose(kernel, (*range(n), n + 2, n + 1, n))
    return kernel.reshape(*window, f // groups, groups * c)


def with_one_batch_axis(images: jax.Array, rank: int) -> tuple[jax.Array, tuple[int, ...]]:
    """Images with one batch axis instead of any number of them, or none; and those that they had.

    Args:
        images: array of shape (*batch, *size, features).
        rank: the number of axes of space.
    """
    batch = images.shape[: images.ndim - rank - 1]
    if len(batch) == 1:
        return images, batch
    return images.reshape(math.prod(batch), *images.shape[len(batch) :]), batch


def with_batch_axes(images: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """Images with the batch axes that `with_one_batch_axis` made one of."""
    return images if len(batch) == 1 else images.reshape(*batch, *images.shape[1:])
