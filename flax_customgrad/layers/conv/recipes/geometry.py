"""`Geometry`: where the windows of a convolution lie, and those of its transpose.

Every pass of a convolution layer is one of two maps of arrays laid out (batch, *space, features):

    correlate        y[o] = sum_t x[o * stride + t * dilation - low] . w[t]
    kernel_gradient  dW[t] = sum_o x[o * stride + t * dilation - low] g[o]

where t runs over the window, and x may be spread out with zeros in between (`input_dilation`). The
gradient of the input is a `correlate` of g with the mirrored kernel: strides and input dilation
change places, and so do the features. A transposed convolution is a `correlate` whose input
dilation is its strides.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Geometry:
    """What a convolution is, but for its batch and its dtype; one number per axis of space.

    Attributes:
        size: extent of the input.
        window: extent of the kernel.
        in_features: features of the input.
        out_features: features of the output.
        strides: steps between windows.
        padding: (low, high) zeros around the spread input; negative ones cut off.
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
            spread(n, d) + low + high
            for n, d, (low, high) in zip(self.size, self.input_dilation, self.padding, strict=True)
        )
        return tuple(
            max(0, (n - spread(k, d)) // s + 1)
            for n, k, d, s in zip(
                padded, self.window, self.kernel_dilation, self.strides, strict=True
            )
        )

    @property
    def transposed(self) -> "Geometry":
        """The geometry of the map from g to dx, whose kernel is `mirrored`."""
        padding = []
        for axis, (low, _) in enumerate(self.padding):
            before = spread(self.window[axis], self.kernel_dilation[axis]) - low - 1
            into = spread(self.size[axis], self.input_dilation[axis])
            reach = spread(self.out[axis], self.strides[axis])
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
    def taps(self) -> Iterator[tuple[int, ...]]:
        """The elements of the window, in the order of the kernel."""
        return itertools.product(*map(range, self.window))

    def pad(self, x: jax.Array) -> jax.Array:
        """The input with its padding.

        Args:
            x: array of shape (batch, *size, features).
        """
        return padded(x, self.padding)

    def seen(self, out: Sequence[int]) -> tuple[int, ...]:
        """How much of the padded input some windows see, from the first element of the first.

        Args:
            out: how many windows lie along each axis.
        """
        return tuple(
            spread(k, d) + spread(o, s) - 1
            for k, d, o, s in zip(self.window, self.kernel_dilation, out, self.strides, strict=True)
        )

    def padding_to(self, extent: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The padding that gives an input that is not spread out an extent: low stays as it is.

        Args:
            extent: what is wanted along each axis; less than there is cuts off.
        """
        return tuple(
            (low, wanted - n - low)
            for (low, _), wanted, n in zip(self.padding, extent, self.size, strict=True)
        )

    def under(self, tap: tuple[int, ...], x: jax.Array) -> jax.Array:
        """What one element of the window sees, of an input that is not spread out.

        Args:
            tap: the element.
            x: array of shape (batch, *size, features), padded.

        Returns:
            Array of shape (batch, *out, features).
        """
        start = [t * d for t, d in zip(tap, self.kernel_dilation, strict=True)]
        stop = [a + spread(o, s) for a, o, s in zip(start, self.out, self.strides, strict=True)]
        return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *self.strides, 1))


ConvPass = Callable[[jax.Array, jax.Array, Geometry], jax.Array]
"""`correlate`, of x and the kernel, or `kernel_gradient`, of x and g."""


def spread(n: int, dilation: int) -> int:
    """The extent of elements at a distance; of none it is 0.

    Args:
        n: how many elements.
        dilation: steps from one to the next.
    """
    return (n - 1) * dilation + 1 if n else 0


def padded(x: jax.Array, padding: tuple[tuple[int, int], ...]) -> jax.Array:
    """An array of shape (batch, *space, features) with zeros around it in space.

    Args:
        x: the array.
        padding: (low, high) for each axis of space; negative ones cut off.
    """
    if not any(map(any, padding)):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])


def mirrored(kernel: jax.Array, groups: int) -> jax.Array:
    """The kernel of the transposed map: reversed in space, features of input and output swapped.

    Args:
        kernel: array of shape (*window, in_features // groups, out_features).
        groups: the number of groups.

    Returns:
        Array of shape (*window, out_features // groups, in_features).
    """
    *window, c, f = kernel.shape
    kernel = lax.rev(kernel, range(len(window))).reshape(*window, c, groups, f // groups)
    return jnp.einsum("...cqf->...fqc", kernel).reshape(*window, f // groups, groups * c)
