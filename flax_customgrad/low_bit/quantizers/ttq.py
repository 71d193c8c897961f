"""TTQ: trained ternary quantization, arXiv:1612.01064.

    forward   y   = p where w > d,  -n where w < -d,  else 0;   d = t max |w|
    backward  dw  = p g,  n g,  g  at the three
              dp  = sum of g where w > d,  dn = - sum of g where w < -d
    kept      two bits an element, p and n

The sizes p and n are learned, and the threshold is a constant to the gradient. The paper prints
the gradient of n without its sign. A size that becomes zero or negative is used as it is.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.low_bit.quantizers.calibration import (
    granularity_of,
    mean_where,
    measured_range,
)
from flax_customgrad.low_bit.quantizers.codes import Codes, to_codes
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.low_bit.quantizers.scheme import Scheme
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.packing import is_packable, pack_bits, unpack_bits
from flax_customgrad.numerics.sharding import AxisName


@dataclass(frozen=True)
class TTQScheme(Scheme):
    """-n, 0 and p, the integers -1, 0 and 1; the parameters are p, n and the threshold d."""

    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The sign of weights beyond the threshold, 0 for the others."""
        return jnp.where(jnp.abs(x) > parameters[2], jnp.sign(x), 0)

    def decode(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """`p`, `-n` or 0."""
        p, n, _ = parameters
        return jnp.where(q > 0, p, jnp.where(q < 0, -n, jnp.zeros_like(q)))

    def latent(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """Weights beyond the threshold, whatever the sizes have become."""
        d = parameters[2]
        return q * jnp.where(d > 0, 2 * d, 1)

    def keep(self, x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        """The integers, in two bits, and the sizes."""
        p, n, _ = parameters
        sides = (self.encode(x, *parameters) + 1).astype(jnp.uint8)
        bits = 2 if is_packable(sides.shape, jax.typeof(sides).sharding) else 8
        return pack_bits(sides, bits), p, n

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[Any, ...]:
        """The cotangents of w, p and n, of which the last two are summed afterwards."""
        sides, p, n = kept
        if sides.shape != g.shape:
            sides = unpack_bits(sides, 2, g.shape[-1])
        above, below = sides == 2, sides == 0
        dw = g * lax.stop_gradient(jnp.where(above, p, jnp.where(below, n, 1)))
        dp, dn = jnp.where(above, g, 0), jnp.where(below, -g, 0)
        return dw, dp, dn, None


class TTQ(Quantizer):
    """Ternary weights whose two sizes are learned.

    Attributes:
        positive: p, the value of large positive weights, learned; float32. `observe` sets it to
            their mean.
        negative: n, likewise for the magnitude of large negative weights.

    Args:
        threshold: t, from 0 to below 1: weights up to t max |w| become 0.
        axis_name: the axis of a `shard_map`, `pmap` or `vmap` over which weights are parts of one
            array, with one threshold for all parts; None where each array is whole.

    Raises:
        ValueError: `threshold` is not in [0, 1).

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> quantizer = fcg.TTQ()
        >>> w = jnp.array([-2.0, 0.1, 0.5, 1.0])
        >>> quantizer.observe(w)
        >>> quantizer(w)
        Array([-2.  ,  0.  ,  0.75,  0.75], dtype=float32)
        >>> nnx.grad(lambda q: q(w).sum())(quantizer).positive[...]
        Array(2., dtype=float32)

    Source: arXiv:1612.01064
    """

    def __init__(self, threshold: float = 0.05, *, axis_name: AxisName = None):
        if not 0 <= threshold < 1:
            raise ValueError(f"TTQ: threshold={threshold!r} must be in [0, 1)")
        self.threshold = threshold
        self.granularity = granularity_of("TTQ", None, axis_name=axis_name)
        self.positive = nnx.Param(jnp.ones(()))
        self.negative = nnx.Param(jnp.ones(()))

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The sizes of the axes along which `nnx.vmap` has stacked quantizers; () for one."""
        return self.positive.shape

    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes weights; returns the values and their codes.

        Args:
            x: array of any shape, float.
        """
        x = jnp.asarray(x)
        parameters = self.positive[...], self.negative[...], self._threshold_of(x)
        return to_codes(x, parameters, TTQScheme(-1, 1))

    def observe(self, x: jax.Array) -> None:
        """Sets both sizes to the mean magnitude of the weights on their side of the threshold.

        Args:
            x: array of any shape, float.
        """
        wide = lax.stop_gradient(x).astype(accumulator(x))
        threshold = self._threshold_of(x)
        for size, w in ((self.positive, wide), (self.negative, -wide)):
            mean = mean_where(w, w > threshold, self.granularity).reshape(())
            size[...] = jnp.where(mean > 0, mean, 1).astype(size.dtype)

    def _threshold_of(self, x: jax.Array) -> jax.Array:
        return self.threshold * measured_range(x, self.granularity, symmetric=True).high
