"""TQT: trained quantization thresholds, arXiv:1903.08066: a scale that is a power of two.

    forward   y  = s clip(round(v), low, high),   v = x / s,   s = 2^ceil(l) / (high + 1)
    backward  dx = g where low <= v <= high, else 0
              dl = s ln 2 sum of g {round(v) - v inside, low, high}
    kept      x and l

What is learned is l, the logarithm of the threshold to base 2; its gradient is that of s without
the ceiling. Multiplying by a power of two is exact, and a shift on integer hardware. No l makes the
scale zero or negative: it stays within the normal numbers.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.low_bit.quantizers.codes import Codes, to_codes
from flax_customgrad.low_bit.quantizers.lsq import LSQScheme
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.low_bit.quantizers.scheme import integer_range
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_bits


@dataclass(frozen=True)
class TQTScheme(LSQScheme):
    """Integers in units of a power of two; l, the logarithm of the threshold, is the parameter."""

    def scale(self, p: jax.Array) -> jax.Array:
        """`2^ceil(l) / (high + 1)`, from the parameter p, which is l."""
        limits = jnp.finfo(p.dtype)
        most = limits.maxexp - max(-self.low, self.high).bit_length()
        exponent = jnp.ceil(p) - math.log2(self.high + 1)
        exponent = jnp.clip(exponent, limits.minexp, most).astype(jnp.int32)
        power = jnp.ldexp(jnp.ones_like(p), exponent)
        return jnp.where(jnp.isnan(p), p, power)

    def scale_slope(self, p: jax.Array) -> jax.Array:
        """`s ln 2`, the derivative of the scale without the ceiling."""
        return math.log(2) * self.scale(p)


class TQT(Quantizer):
    """Trained quantization thresholds: power-of-two scales that are learned.

    Attributes:
        log2_t: the logarithm of the threshold to base 2, learned; float32. `observe` sets the
            threshold to the largest magnitude; before, it is 1.

    Args:
        bits: from 2 to 16.
        signed: whether the integers are -2^(bits-1) to 2^(bits-1) - 1, or 0 to 2^bits - 1.

    Raises:
        ValueError: `bits` is not from 2 to 16.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> quantizer = fcg.TQT(bits=3)
        >>> quantizer.observe(jnp.array([1.5, -0.7]))
        >>> quantizer(jnp.array([0.6, -0.9, 1.5]))
        Array([ 0.5, -1. ,  1.5], dtype=float32)

    Source: arXiv:1903.08066
    """

    def __init__(self, bits: int = 8, *, signed: bool = True):
        self.bits, self.signed = check_bits("TQT", bits, most=16), signed
        self.log2_t = nnx.Param(jnp.zeros(()))

    @property
    def integers(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return integer_range(self.bits, self.signed)

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The sizes of the axes along which `nnx.vmap` has stacked quantizers; () for one."""
        return self.log2_t.shape

    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes an array; returns the values and their codes.

        Args:
            x: array of any shape, float.
        """
        scheme = TQTScheme(*self.integers, grad_scale=1.0, features=None)
        return to_codes(jnp.asarray(x), (self.log2_t[...],), scheme)

    def observe(self, x: jax.Array) -> None:
        """Sets the threshold to the largest finite magnitude, or to 1 for zeros.

        Args:
            x: array of any shape, float, like those to come.
        """
        size = jnp.abs(lax.stop_gradient(x).astype(accumulator(x)))
        largest = jnp.max(size, initial=0, where=jnp.isfinite(size))
        mantissa, exponent = jnp.frexp(jnp.where(largest > 0, largest, 1))
        # A logarithm that is rounded up to just above an integer would double the scale.
        log2_t = exponent + jnp.where(mantissa == 0.5, -1, jnp.minimum(jnp.log2(mantissa), 0))
        self.log2_t[...] = log2_t.astype(self.log2_t.dtype)
