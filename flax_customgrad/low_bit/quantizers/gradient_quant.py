"""Quantizing a gradient: the identity, whose backward rounds the cotangent.

    forward   y  = x
    backward  GradientQuant   dx = M round(n g / M) / n,                 n = 2^(bits-1) - 1
              DoReFaGradient  dx = M (2 round(n (g / M + 1) / 2) / n - 1),   n = 2^bits - 1
                              M = max |g|;  round to the nearest, or at random to one of the two
                              neighbours, such that the mean is exact
    kept      the key of the noise, or nothing

A gradient of zeros stays zeros, though 0 is not a value of DoReFa-Net's. A NaN or an infinity makes
everything in its range non-finite. Under `jax.vmap` examples have the same noise. Second
derivatives are those of the identity.
"""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.contract.residual_storage import with_derivative_of
from flax_customgrad.estimators.rounding.rounding import round_with_noise
from flax_customgrad.low_bit.quantizers.calibration import (
    Axis,
    Granularity,
    granularity_of,
    measured_range,
)
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_bits
from flax_customgrad.numerics.noise_stream import fork_stream
from flax_customgrad.numerics.sharding import AxisName


@dataclass(frozen=True)
class GradientRounding:
    """The rounding of a gradient, in units of its largest magnitude M.

    Attributes:
        n: how many steps there are from 0 to M if 0 is a value, or from -M to M if it is not.
        has_zero: whether 0 is a value.
        granularity: which elements share a range.
    """

    n: int
    has_zero: bool
    granularity: Granularity

    def __call__(self, g: jax.Array, key: jax.Array | None) -> jax.Array:
        """The quantized gradient.

        Args:
            g: array of any shape, float32 or wider.
            key: the key of the noise; None to round to the nearest.

        Returns:
            Array like g.
        """
        M = measured_range(g, self.granularity, symmetric=True).high
        r = g / jnp.where(M == 0, 1, M)
        v = self.n * (r if self.has_zero else (r + 1) / 2)
        if key is None:
            q = jnp.round(v)
        else:
            q = round_with_noise(v, jax.random.uniform(key, v.shape, jnp.float32))
        q = jnp.minimum(q, self.n)
        quantized = M * ((q if self.has_zero else 2 * q - self.n) * (1 / self.n))
        return with_derivative_of(lax.stop_gradient(quantized), g)


class Residuals(NamedTuple):
    """What the backward of `quantize_gradient` keeps."""

    key: jax.Array | None
    rounding: GradientRounding


@custom_vjp(surrogate=True)
def quantize_gradient(x: jax.Array, key: jax.Array | None, rounding: GradientRounding) -> jax.Array:
    """The identity, whose gradient is quantized.

    Args:
        x: array of any shape, float.
        key: the key of the noise in the gradient; None to round to the nearest.
        rounding: the rounding of the gradient.

    Returns:
        x.
    """
    return x


def _fwd(
    x: jax.Array, key: jax.Array | None, rounding: GradientRounding
) -> tuple[jax.Array, Residuals]:
    return quantize_gradient(x, key, rounding), Residuals(key, rounding)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None, None]:
    dx = res.rounding(g.astype(accumulator(g)), res.key)
    chex.assert_equal_shape([dx, g])
    return dx, None, None


quantize_gradient.defvjp(_fwd, _bwd)


class GradientQuant(nnx.Module):
    """The identity, whose gradient is rounded to integers of few bits in its own range.

    Pass it to a quantized layer as `gradient`.

    Args:
        bits: from 2 to 8.
        stochastic: whether to round at random, such that the mean is exact, or to the nearest; in
            eval mode (see `nnx.Module.eval`) it is to the nearest, and nothing is drawn.
        axis: the axes along which each index has a range of its own, such as 0 for examples;
            "token" for each vector along the last axis; None for one range.
        axis_name: the axis of a `shard_map`, `pmap` or `vmap` over which gradients are parts of one
            array, with one range for all parts; None where each array is whole.
        rng_collection: the stream of `rngs` to draw from.
        rngs: the streams; needed for stochastic rounding.

    Raises:
        ValueError: `bits` is not from 2 to 8, or `stochastic` is True without `rngs`.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> layer = fcg.GradientQuant(bits=2, stochastic=False)
        >>> jax.grad(lambda x: layer(x) @ jnp.array([0.9, -0.5, 0.3]))(jnp.ones(3))
        Array([ 0.9, -0.9,  0. ], dtype=float32)

    Source: arXiv:1502.02551
    """

    def __init__(
        self,
        bits: int = 8,
        *,
        stochastic: bool = True,
        axis: Axis = None,
        axis_name: AxisName = None,
        rng_collection: str = "noise",
        rngs: nnx.Rngs | None = None,
    ):
        self.bits = check_bits("GradientQuant", bits)
        self.granularity = granularity_of("GradientQuant", axis, axis_name=axis_name)
        self.deterministic = False
        self.rngs = nnx.data(None)
        if stochastic:
            self.rngs = fork_stream("GradientQuant: stochastic=True", rng_collection, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x, and quantizes its gradient.

        Args:
            x: array of any shape, float.
        """
        key = None if self.rngs is None or self.deterministic else self.rngs()
        return quantize_gradient(
            x, key, GradientRounding(2 ** (self.bits - 1) - 1, True, self.granularity)
        )


class DoReFaGradient(nnx.Module):
    """The identity with the quantized gradient of DoReFa-Net.

    Pass it to a quantized layer as `gradient`. In eval mode (see `nnx.Module.eval`) it rounds to
    the nearest, and draws nothing.

    Args:
        bits: from 1 to 8; values are odd multiples of M / (2^bits - 1).
        axis: the axes along which each index has a range of its own: 0, each example, as in the
            paper; None for one range.
        axis_name: the axis of a `shard_map`, `pmap` or `vmap` over which gradients are parts of one
            array, with one range for all parts; None where each array is whole.
        rng_collection: the stream of `rngs` to draw from.
        rngs: the streams.

    Raises:
        ValueError: `bits` is not from 1 to 8.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> def loss(layer, x):
        ...     return (layer(x) @ jnp.array([3.0, -1.0])).sum()
        >>> layer = fcg.DoReFaGradient(bits=1, rngs=nnx.Rngs(0))
        >>> g = nnx.grad(loss, argnums=1)(layer, jnp.ones((1000, 2)))
        >>> jnp.unique(g), g.mean(0).round()
        (Array([-3.,  3.], dtype=float32), Array([ 3., -1.], dtype=float32))

    Source: arXiv:1606.06160
    """

    def __init__(
        self,
        bits: int = 8,
        *,
        axis: Axis = 0,
        axis_name: AxisName = None,
        rng_collection: str = "noise",
        rngs: nnx.Rngs,
    ):
        self.bits = check_bits("DoReFaGradient", bits, least=1)
        self.granularity = granularity_of("DoReFaGradient", axis, axis_name=axis_name)
        self.deterministic = False
        self.rngs = fork_stream("DoReFaGradient", rng_collection, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x, and quantizes its gradient.

        Args:
            x: array of any shape, float.
        """
        key = None if self.deterministic else self.rngs()
        return quantize_gradient(
            x, key, GradientRounding(2**self.bits - 1, False, self.granularity)
        )
