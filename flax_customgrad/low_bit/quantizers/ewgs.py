"""EWGS: element-wise gradient scaling, in an interval that is learned, arXiv:2104.00903.

    forward   r  = clip((x - l) / (u - l), 0, 1),   h = round(n r) / n,   n = 2^bits - 1
              y  = a h,  or, signed, a (2 h - 1)
    backward  k  = a g,  or, signed, 2 a g;   k' = k (1 + delta sign(k) (r - h))
              dx = k' / (u - l) where l <= x <= u, else 0
              dl = sum of k' (r - 1) / (u - l) inside,   du = - sum of k' r / (u - l) inside
              da = sum of g y / a
    kept      x, l, u and a

A gradient whose step moves r towards h, to which it was rounded, is made larger, and one that moves
it away smaller; with delta = 0 it is that of the straight-through estimator. Both ends are inside.
Where an optimizer closes the interval or turns it around, the magnitude of `u - l` is used, and at
least 2^-23 |a|; its derivative then has the other sign. The paper has the scale a at the output of
a layer, here each quantizer has its own.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.ordering import wait_for
from flax_customgrad.low_bit.quantizers.codes import Codes, to_codes
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.low_bit.quantizers.scheme import Scheme
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_bits
from flax_customgrad.numerics.scaling import abs_floor, abs_floor_slope, magnitude, quotient


@dataclass(frozen=True)
class EWGSScheme(Scheme):
    """Integers from 0 to n in an interval; the parameters are its ends l, u and the scale a.

    Attributes:
        signed: whether the values are in [-a, a], or in [0, a].
        delta: how much of the rounding error scales the gradient.
    """

    signed: bool
    delta: float

    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The nearest integer to `n r`."""
        return jnp.round(self.high * jnp.clip(_place(x, *parameters), 0, 1))

    def decode(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """`a h`, or `a (2 h - 1)`, where `h = q / n`."""
        return self._integer(q) * (parameters[2] * (1 / self.high))

    def latent(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """`l + (u - l) h`."""
        l, u, a = parameters
        return l + _width(l, u, a) * (q * (1 / self.high))

    def keep(self, x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        """`x` and the parameters."""
        return x, *parameters

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[Any, ...]:
        """The cotangents of x, l, u and a, of which the last three are summed afterwards."""
        g, (x, l, u, a) = wait_for(g, kept)
        width = _width(l, u, a)
        r = _place(x, l, u, a)
        inside = (r >= 0) & (r <= 1)
        r = jnp.clip(r, 0, 1)
        q = jnp.round(self.high * r)
        h = q * (1 / self.high)
        k = (2 if self.signed else 1) * lax.stop_gradient(a) * g
        k = k * (1 + self.delta * jnp.sign(k) * lax.stop_gradient(r - h))
        dx = jnp.where(inside, k, 0) / width
        sign = abs_floor_slope(u - l)
        dl, du = dx * (sign * r - 1), dx * -sign * r
        da = g * self._integer(q) * (1 / self.high)
        return dx, dl, du, da

    def _integer(self, q: jax.Array) -> jax.Array:
        return 2 * q - self.high if self.signed else q


def _place(x: jax.Array, l: jax.Array, u: jax.Array, a: jax.Array) -> jax.Array:
    """`(x - l) / (u - l)`: where x lies in the interval."""
    most = float(jnp.finfo(x.dtype).max)
    return quotient(jnp.clip(x - l, -most, most), _width(l, u, a))


def _width(l: jax.Array, u: jax.Array, a: jax.Array) -> jax.Array:
    # In proportion to the values, so that a gradient is at most 2^24 times as large.
    return jnp.maximum(abs_floor(u - l), 2.0**-23 * jnp.abs(a))


class EWGS(Quantizer):
    """Element-wise gradient scaling, in an interval that is learned.

    The gradient is made larger or smaller in proportion to the rounding error.

    Attributes:
        low: l, the lower end of the interval, learned; float32. `observe` sets all three.
        high: u, the upper end, learned; float32.
        scale: a, the largest value, learned; float32.

    Args:
        bits: from 1 to 16.
        signed: whether values are in [-scale, scale], for weights, or in [0, scale], for what
            comes from a relu.
        delta: how much of the rounding error scales the gradient; 0 for none.

    Raises:
        ValueError: `bits` is not from 1 to 16, or `delta` is negative or not finite.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> quantizer = fcg.EWGS(bits=2, delta=0.5)
        >>> x = jnp.array([-4.0, -0.8, 1.2, 2.2])
        >>> quantizer(x)
        Array([-3., -1.,  1.,  3.], dtype=float32)
        >>> jax.grad(lambda x: quantizer(x).sum())(x).round(2)
        Array([0.  , 1.02, 1.02, 0.93], dtype=float32)

    Source: arXiv:2104.00903
    """

    def __init__(self, bits: int = 8, *, signed: bool = True, delta: float = 1e-3):
        self.bits, self.signed = check_bits("EWGS", bits, least=1, most=16), signed
        if not 0 <= delta < math.inf:
            raise ValueError(f"EWGS: delta={delta!r} must be a number from 0 on")
        self.delta = delta
        # 3 standard deviations of a unit normal distribution, as `observe` has it.
        low, high, scale = (-3.0, 3.0, 3.0) if signed else (0.0, 3.0, 3.0)
        self.low, self.high, self.scale = (
            nnx.Param(jnp.full((), value)) for value in (low, high, scale)
        )

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The sizes of the axes along which `nnx.vmap` has stacked quantizers; () for one."""
        return self.low.shape

    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes an array; returns the values and their codes.

        Args:
            x: array of any shape, float.
        """
        parameters = self.low[...], self.high[...], self.scale[...]
        scheme = EWGSScheme(0, 2**self.bits - 1, self.signed, self.delta)
        return to_codes(jnp.asarray(x), parameters, scheme)

    def observe(self, x: jax.Array) -> None:
        """Sets the interval as the paper does, and the scale such that values are close to x.

        Signed, the interval is 3 standard deviations on either side of 0; unsigned, it is from the
        least value to 3 standard deviations of the normal distribution that a relu would have
        turned into x. Where x hardly varies, so that its mean magnitude lies beyond that, it ends
        at the largest magnitude. What is not finite is left out.

        Args:
            x: array of any shape, float, like those to come.
        """
        wide = lax.stop_gradient(x).astype(accumulator(x))
        finite = jnp.isfinite(wide)
        wide = jnp.where(finite, wide, 0)
        power = magnitude(wide, range(wide.ndim)).reshape(())
        size = jnp.abs(wide / power)
        n = jnp.maximum(jnp.sum(finite), 1)
        mean, mean_size = jnp.sum(wide / power) / n, jnp.sum(size) / n
        deviation = jnp.sqrt(jnp.sum(jnp.where(finite, wide / power - mean, 0) ** 2) / n)
        high = 3 * deviation / (1 if self.signed else math.sqrt(1 - 2 / math.pi))
        high = jnp.where(high > mean_size, high, jnp.max(size, initial=0))
        is_zero = high == 0
        # The width of an interval between the largest numbers would overflow.
        most = float(jnp.finfo(wide.dtype).max) / 2
        high = jnp.minimum(high, most / power) * power
        low = -high if self.signed else jnp.maximum(jnp.min(wide, initial=0), -most)
        scale = jnp.maximum(jnp.abs(low), high)
        if self.signed:
            # No integer stands for 0: only a scale of 0 leaves zeros what they are.
            low, high = jnp.where(is_zero, -1, low), jnp.where(is_zero, 1, high)
        else:
            high, scale = jnp.where(high > low, high, 1), jnp.where(is_zero, 1, scale)
        for parameter, value in ((self.low, low), (self.high, high), (self.scale, scale)):
            parameter[...] = jnp.asarray(value, parameter.dtype)
