"""DoReFa: weights and activations in [-1, 1] and [0, 1], arXiv:1606.06160.

    forward   DoReFaWeight      y  = 2 q(tanh(w) / (2 M) + 1 / 2) - 1,   M = max |tanh(w)|
              DoReFaActivation  y  = q(clip(x, 0, 1))
              q(r) = round(n r) / n,   n = 2^bits - 1
    backward  DoReFaWeight      dw = g (1 - tanh(w)^2) / M
              DoReFaActivation  dx = g where 0 <= x <= 1, else 0
    kept      DoReFaWeight w and M; DoReFaActivation a bit an element

M is a constant to the gradient. No weight becomes 0: with two bits the values are -1, -1/3, 1/3 and
1. For the one-bit weights of DoReFa-Net use `BinaryWeight(axis=None, clip_value=None)`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.contract.ordering import wait_for
from flax_customgrad.low_bit.quantizers.calibration import granularity_of, measured_range
from flax_customgrad.low_bit.quantizers.codes import Codes, to_codes
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.low_bit.quantizers.scheme import Scheme
from flax_customgrad.numerics.argument_checks import check_bits
from flax_customgrad.numerics.hyperbolic import sech_squared
from flax_customgrad.numerics.packing import masked, pack_mask
from flax_customgrad.numerics.scaling import quotient
from flax_customgrad.numerics.sharding import AxisName


@dataclass(frozen=True)
class DoReFaWeightScheme(Scheme):
    """Values at equal distances in [-1, 1], for tanh(w) / M; M is the parameter."""

    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The nearest integer to `n r`, where `r = tanh(w) / (2 M) + 1 / 2`."""
        (M,) = parameters
        r = quotient(jnp.tanh(x), 2 * M) + 0.5
        return jnp.clip(jnp.round(self.high * r), 0, self.high)

    def decode(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """`2 q / n - 1`, rounded once."""
        return (2 * q - self.high) * (1 / self.high)

    def latent(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The weights whose `tanh(w) / M` are the values."""
        # tanh rounds to 1 long before infinity.
        largest = 1 - float(jnp.finfo(q.dtype).epsneg)
        return jnp.arctanh(jnp.clip(parameters[0] * self.decode(q), -largest, largest))

    def keep(self, x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        """`w` and `M`."""
        return x, *parameters

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[Any, ...]:
        """`g` times the derivative of `tanh(w) / M`."""
        g, (w, M) = wait_for(g, kept)
        return (g * sech_squared(w) / M,)


@dataclass(frozen=True)
class DoReFaActivationScheme(Scheme):
    """Values at equal distances in [0, 1]; without parameters."""

    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The nearest integer to `n x` in [0, n]."""
        return jnp.round(self.high * jnp.clip(x, 0, 1))

    def decode(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The integers divided by n."""
        return q * (1 / self.high)

    def keep(self, x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        """Which elements lie inside."""
        return (pack_mask((x >= 0) & (x <= 1)),)

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[Any, ...]:
        """`g` inside, and 0 outside."""
        return (masked(g, *kept),)


class DoReFaWeight(Quantizer):
    """The weights of DoReFa-Net: tanh(w), relative to its largest, in [-1, 1].

    Args:
        bits: from 2 to 16; the values are odd multiples of 1 / (2^bits - 1).
        axis_name: the axis of a `shard_map`, `pmap` or `vmap` over which weights are parts of one
            array, with one M for all parts; None where each array is whole.

    Raises:
        ValueError: `bits` is not from 2 to 16.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.DoReFaWeight(bits=2)(jnp.array([-0.5, -0.1, 0.2, 0.4]))
        Array([-1.        , -0.33333334,  0.33333334,  1.        ], dtype=float32)

    Source: arXiv:1606.06160
    """

    def __init__(self, bits: int = 8, *, axis_name: AxisName = None):
        self.bits = check_bits("DoReFaWeight", bits, most=16)
        self.granularity = granularity_of("DoReFaWeight", None, axis_name=axis_name)

    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes weights; returns the values and their codes.

        Args:
            x: array of any shape, float.
        """
        x = jnp.asarray(x)
        M = jnp.tanh(measured_range(x, self.granularity, symmetric=True).high)
        return to_codes(x, (jnp.where(M == 0, 1, M),), DoReFaWeightScheme(0, 2**self.bits - 1))


class DoReFaActivation(Quantizer):
    """The activations of DoReFa-Net: clipped to [0, 1].

    Args:
        bits: from 1 to 16; the values are multiples of 1 / (2^bits - 1).

    Raises:
        ValueError: `bits` is not from 1 to 16.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> quantizer, x = fcg.DoReFaActivation(bits=2), jnp.array([-1.0, 0.4, 0.9, 1.0, 2.0])
        >>> quantizer.quantize(x).codes
        Array([0, 1, 3, 3, 3], dtype=uint8)
        >>> jax.grad(lambda x: quantizer(x).sum())(x)
        Array([0., 1., 1., 1., 0.], dtype=float32)

    Source: arXiv:1606.06160
    """

    def __init__(self, bits: int = 8):
        self.bits = check_bits("DoReFaActivation", bits, least=1, most=16)

    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes activations; returns the values and their codes.

        Args:
            x: array of any shape, float.
        """
        return to_codes(jnp.asarray(x), (), DoReFaActivationScheme(0, 2**self.bits - 1))
