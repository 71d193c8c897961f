"""PACT: an activation that is clipped at a learned bound, arXiv:1805.06085.

    forward   y  = s round(clip(x, 0, a) / s),   s = a / high,   a = |p|
    backward  dx = g where 0 <= x < a, else 0
              da = sum of g where x >= a,   dp = sign(p) da
    kept      two bits an element, and p

The bound replaces that of relu6, and is regularized like a weight. Where an optimizer drives p to
zero or below, its magnitude is used, with a and s at least the least normal number; at 0 the
gradient is the one from above.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.low_bit.quantizers.codes import Codes, to_codes
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.low_bit.quantizers.scheme import Scheme
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_bits, check_positive
from flax_customgrad.numerics.packing import masked, pack_mask
from flax_customgrad.numerics.scaling import abs_floor, abs_floor_slope, quotient


@dataclass(frozen=True)
class PACTScheme(Scheme):
    """Integers from 0 to `high` in units of s; p is the parameter."""

    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The nearest integer to x / s in [0, high]."""
        return jnp.clip(jnp.round(quotient(x, self._scale(*parameters))), 0, self.high)

    def decode(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The integers times s."""
        return q * self._scale(*parameters)

    def step(self, *parameters: jax.Array) -> jax.Array | None:
        """`s`."""
        return self._scale(*parameters)

    def zero_point(self, *parameters: jax.Array) -> jax.Array | int | None:
        """0."""
        return 0

    def keep(self, x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        """Which elements lie inside, and which at the bound or beyond; and p."""
        a = abs_floor(parameters[0])
        return pack_mask((x >= 0) & (x < a)), pack_mask(x >= a), *parameters

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[Any, ...]:
        """The cotangents of x and p, of which the last is summed afterwards."""
        inside, beyond, p = kept
        dx, da = masked(g, inside), masked(g, beyond)
        return dx, abs_floor_slope(p) * da

    def _scale(self, p: jax.Array) -> jax.Array:
        return abs_floor(p * (1 / self.high))


class PACT(Quantizer):
    """Parameterized clipping activation: the bound of the range is learned.

    It clips at 0 as well, so it can replace a relu.

    Attributes:
        alpha: the bound, learned; float32. `observe` sets it to the largest value.

    Args:
        bits: from 1 to 16; the integers are 0 to 2^bits - 1.
        alpha: the initial bound; 10 in the paper.

    Raises:
        ValueError: `bits` is not from 1 to 16, or `alpha` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> quantizer, x = fcg.PACT(bits=2, alpha=3.0), jnp.array([-1.0, 0.6, 2.4, 3.0, 7.0])
        >>> quantizer(x)
        Array([0., 1., 2., 3., 3.], dtype=float32)
        >>> jax.grad(lambda x: quantizer(x).sum())(x)
        Array([0., 1., 1., 0., 0.], dtype=float32)
        >>> nnx.grad(lambda q: q(x).sum())(quantizer).alpha[...]
        Array(2., dtype=float32)

    Source: arXiv:1805.06085
    """

    def __init__(self, bits: int = 8, *, alpha: float = 10.0):
        self.bits = check_bits("PACT", bits, least=1, most=16)
        self.alpha = nnx.Param(jnp.full((), check_positive("PACT", "alpha", alpha), jnp.float32))

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The sizes of the axes along which `nnx.vmap` has stacked quantizers; () for one."""
        return self.alpha.shape

    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes an array; returns the values and their codes.

        Args:
            x: array of any shape, float.
        """
        return to_codes(jnp.asarray(x), (self.alpha[...],), PACTScheme(0, 2**self.bits - 1))

    def observe(self, x: jax.Array) -> None:
        """Sets the bound to the largest finite value, or to 1 where none is positive.

        Args:
            x: array of any shape, float, like those to come.
        """
        wide = lax.stop_gradient(x).astype(accumulator(x))
        largest = jnp.max(wide, initial=0, where=jnp.isfinite(wide))
        self.alpha[...] = jnp.where(largest > 0, largest, 1).astype(self.alpha.dtype)
