"""Quantization: each element becomes an integer of few bits, and is decoded from it to a value.

    forward   q  = encode(x, p...)              integers in [low, high]
              y  = decode(q, p...)              such as q s, for a scale s
    backward  dx, dp... as the scheme says, functions of g and of what it keeps
    kept      what the scheme says: nothing, a bit an element, or x

A scheme is flat wherever it has a derivative, so each states its surrogate gradient: the
straight-through estimator (arXiv:1308.3432), masked or not, and for what is learned, a scale or a
bound, that of its paper. In half precision everything is computed in float32 and rounded once. An
infinity or NaN has no integer and stays what it is.

Values depend on codes alone, and are the same in every program: no decoding adds to a product,
which XLA rounds once where it fuses the two and twice where it does not.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.numerics.dtypes import in_dtype, widened
from flax_customgrad.numerics.elementwise import Elementwise, elementwise_surrogate
from flax_customgrad.numerics.packing import masked, pack_mask


@dataclass(frozen=True)
class Scheme(Elementwise):
    """A quantization and its surrogate gradient; called as `scheme(x, *parameters)`.

    Attributes:
        low: the smallest integer.
        high: the largest integer, at most 65535 above it.
    """

    low: int
    high: int

    @property
    def bits(self) -> int:
        """How many bits a code takes."""
        return max((self.high - self.low).bit_length(), 1)

    @property
    def is_int8(self) -> bool:
        """Whether int8 holds its integers."""
        return self.low >= -128 and self.high <= 127

    def __call__(self, x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Quantizes an array.

        Args:
            x: array of any shape, float.
            *parameters: such as a scale; float arrays that fit the shape of x.

        Returns:
            The values, an array like x, and their codes, an array of that shape, which are the
            integers minus `low`, uint8 for at most 8 bits, else uint16.
        """
        return elementwise_surrogate(x, parameters, self)

    def primal(self, x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Values and codes; computed in float32 or wider."""
        wide, *p = widened(x.dtype, x, *parameters)
        q = self.encode(wide, *p)
        y = jnp.where(jnp.isfinite(wide), self.decode(q, *p), wide)
        return in_dtype(y, x.dtype), (q - self.low).astype(
            jnp.uint8 if self.bits <= 8 else jnp.uint16
        )

    def residuals(self, x: jax.Array, y: Any, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        """What `keep` returns; x itself stays in its own dtype."""
        wide, *p = widened(x.dtype, x, *parameters)
        return tuple(x if a is wide else a for a in self.keep(wide, *p))

    @abstractmethod
    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The integers, as floats of float32 or wider; anything where x is not finite."""

    @abstractmethod
    def decode(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The values that integers encode."""

    def step(self, *parameters: jax.Array) -> jax.Array | None:
        """The distance of neighbouring values; None where they have none that is the same."""
        return None

    def zero_point(self, *parameters: jax.Array) -> jax.Array | int | None:
        """`z`, where values are `(q - z) step`; None where they are not."""
        return None

    def latent(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """Weights that `encode` gives these integers for; the values, unless a scheme maps those.

        Args:
            q: integers, as floats of float32 or wider.
            *parameters: the parameters that `encode` is called with.
        """
        return self.decode(q, *parameters)

    @abstractmethod
    def keep(self, x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        """What is kept for `cotangents`, given x and the parameters in float32 or wider."""


@dataclass(frozen=True)
class ClippedGradientScheme(Scheme):
    """A scheme whose gradient passes near 0, or everywhere; parameters have none.

    Attributes:
        clip_value: the gradient passes where |x| <= clip_value; None for everywhere.
    """

    clip_value: float | None

    def keep(self, x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        """Which elements lie within the bound."""
        return () if self.clip_value is None else (pack_mask(jnp.abs(x) <= self.clip_value),)

    def cotangents(self, g: jax.Array, *mask: jax.Array) -> tuple[Any, ...]:
        """`g` within the bound, and 0 outside."""
        return (masked(g, *mask) if mask else g,)


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and the largest integer of some bits, with a sign or without."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
