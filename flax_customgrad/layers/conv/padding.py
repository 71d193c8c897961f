"""Padding as nnx's layers write it: what is around an image, and how much of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.layers.conv.recipes.geometry import spread

_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}

Pairs = tuple[tuple[int, int], ...]
"""(low, high) for each axis of space."""


@dataclass(frozen=True)
class BoundaryPadding:
    """What is put around an image before it is convolved, and is not zeros.

    Attributes:
        mode: "wrap" or "reflect", of `jnp.pad`.
        pairs: how much, low and high.
    """

    mode: str
    pairs: Pairs

    def extent(self, size: Sequence[int]) -> tuple[int, ...]:
        """The extent of an image with its surroundings.

        Args:
            size: that of the image.
        """
        return tuple(n + low + high for n, (low, high) in zip(size, self.pairs, strict=True))

    def of(self, x: jax.Array) -> jax.Array:
        """The image with its surroundings.

        Args:
            x: array of shape (batch, *size, features).
        """
        return jnp.pad(x, [(0, 0), *self.pairs, (0, 0)], mode=self.mode)

    def transpose(self, g: jax.Array, x: jax.Array) -> jax.Array:
        """The gradient of `of`: what is around goes back to where it was copied from.

        Args:
            g: cotangent of the padded image.
            x: the image, for its type, which is that of g.
        """
        return jax.linear_transpose(self.of, x)(g)[0]


def resolved(
    padding: Any,
    size: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    input_dilation: Sequence[int],
) -> tuple[Pairs, BoundaryPadding | None]:
    """The zeros around an image, or what there is instead of them.

    Args:
        padding: int, pairs, or a name, as `flax.nnx.Conv` takes it.
        size: extent of the image.
        window: extent of the kernel.
        strides: steps between windows.
        dilation: steps between the elements of the window.
        input_dilation: steps between the elements of the image.

    Raises:
        ValueError: the padding is none of those, CAUSAL for more than one axis, or SAME for an
            image that is spread out.
    """
    reach = list(map(spread, window, dilation))
    name = padding if isinstance(padding, str) else None
    if name in _MODES:
        pairs = tuple(((k - 1) // 2, k // 2) for k in reach)
        return ((0, 0),) * len(pairs), BoundaryPadding(_MODES[name], pairs)
    if name == "CAUSAL":
        if len(reach) != 1:
            raise ValueError(
                f"padding='CAUSAL' is for one axis of space, and the kernel has {len(reach)}; "
                "write (low, high) pairs, such as [(2, 0), (1, 1)]"
            )
        return ((reach[0] - 1, 0),), None
    names = "'SAME', 'VALID', 'CIRCULAR', 'REFLECT' or 'CAUSAL'"
    if name == "VALID":
        return ((0, 0),) * len(reach), None
    if name in ("SAME", "SAME_LOWER"):
        if any(d > 1 for d in input_dilation):
            raise ValueError(
                f"padding={name!r} is for an input that is not spread out, and input_dilation="
                f"{tuple(input_dilation)}; write (low, high) pairs, one for each axis"
            )
        return tuple(lax.padtype_to_pads(size, reach, strides, name)), None
    return pairs_of(padding, len(reach), names), None


def pairs_of(padding: Any, rank: int, names: str) -> Pairs:
    """Padding in numbers.

    Args:
        padding: int, or one int or (low, high) tuple for each axis.
        rank: the number of axes.
        names: the names that could have been written instead, for the error.

    Raises:
        ValueError: it is none of those.
    """
    if isinstance(padding, int):
        return ((padding, padding),) * rank
    if isinstance(padding, Sequence) and not isinstance(padding, str) and len(padding) == rank:
        pairs = [(p, p) if isinstance(p, int) else p for p in padding]
        if all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
            return tuple(pairs)  # type: ignore[arg-type]
    raise ValueError(
        f"padding={padding!r}; write {names}, an int, or {rank} ints or (low, high) tuples, one "
        "for each axis of kernel_size"
    )
