"""Quantization: each element becomes an integer of few bits, and the value that it stands for.

    forward   q  = encode(x, p...)              integers in [low, high]
              y  = decode(q, p...)              such as q s, for a scale s
    backward  dx, dp... as the scheme says, functions of g and of what it keeps
    kept      what the scheme says: nothing, a bit an element, or x

A scheme is flat wherever it has a derivative, so each states the gradient that it pretends to
have: the straight-through estimator (arXiv:1308.3432), masked or not, and for what is learned, a
scale or a bound, that of its paper. In half precision everything is computed in float32 and
rounded once. An infinity or NaN has no integer and stays what it is.

Values come from codes alone, and the same ones in every program: no decoding adds to a product,
which XLA rounds once where it fuses the two and twice where it does not.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.numerics.dtypes import in_dtype, widened
from flax_customgrad.numerics.packing import masked, pack_mask

Arrays = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Scheme(ABC):
    """How an array is quantized, and how the gradient passes; parameters broadcast to x.

    Attributes:
        low: the smallest integer.
        high: the largest integer, at most 255 above it.
    """

    low: int
    high: int

    @property
    def bits(self) -> int:
        """How many bits a code takes."""
        return max((self.high - self.low).bit_length(), 1)

    @abstractmethod
    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The integers, as floats of float32 or wider; anything where x is not finite."""

    @abstractmethod
    def decode(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The values that integers stand for."""

    @abstractmethod
    def keep(self, x: jax.Array, *parameters: jax.Array) -> Arrays:
        """What is kept for the backward; x itself is kept in its own dtype."""

    @abstractmethod
    def backward(self, g: jax.Array, *kept: jax.Array) -> tuple[Any, ...]:
        """The gradient of x, and where parameters have any theirs, of g in float32 or wider."""


@dataclass(frozen=True)
class Bounded(Scheme):
    """A scheme whose gradient passes near 0, or everywhere; parameters have none.

    Attributes:
        clip_value: it passes where |x| <= clip_value; None for everywhere.
    """

    clip_value: float | None

    def keep(self, x: jax.Array, *parameters: jax.Array) -> Arrays:
        """Which elements lie within the bound."""
        return () if self.clip_value is None else (pack_mask(jnp.abs(x) <= self.clip_value),)

    def backward(self, g: jax.Array, *mask: jax.Array) -> tuple[Any, ...]:
        """The gradient within the bound."""
        return (masked(g, *mask) if mask else g,)


def quotient(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The quotient, rounded once, so that ties are where they should be; NaN for a non-finite x.

    XLA on a CPU multiplies by the inverse of what is broadcast, which is rounded twice and in one
    of four elements another number; it cannot see that each element has the same divisor here.

    Args:
        x: array of any shape, float.
        scale: array that broadcasts to it, float.
    """
    return x / (scale + 0 * x)


class Residuals(NamedTuple):
    """What the backward of `quantize` keeps."""

    kept: Arrays
    scheme: Scheme


@custom_vjp(surrogate=True)
def quantize(x: jax.Array, parameters: Arrays, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """Quantizes an array.

    Args:
        x: array of any shape, float.
        parameters: of the scheme, such as a scale; float, of shapes that fit x.
        scheme: how.

    Returns:
        The values, like x, and their codes, the integers less the scheme's lowest: uint8 of the
        shape of x.
    """
    wide, *p = widened(x.dtype, x, *parameters)
    q = scheme.encode(wide, *p)
    y = jnp.where(jnp.isfinite(wide), scheme.decode(q, *p), wide)
    return in_dtype(y, x.dtype), (q - scheme.low).astype(jnp.uint8)


def _fwd(
    x: jax.Array, parameters: Arrays, scheme: Scheme
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    wide, *p = widened(x.dtype, x, *parameters)
    kept = tuple(x if a is wide else a for a in scheme.keep(wide, *p))
    return quantize(x, parameters, scheme), Residuals(kept, scheme)


def _bwd(res: Residuals, g: tuple[jax.Array, Any]) -> tuple[Any, Any, None]:
    dx, *dparameters = res.scheme.backward(*widened(g[0].dtype, g[0], *res.kept))
    return dx, tuple(dparameters) or None, None


quantize.defvjp(_fwd, _bwd)
