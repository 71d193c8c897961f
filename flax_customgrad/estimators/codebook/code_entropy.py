"""How sure vectors are of their codes, each for itself and all together, in nats.

Codes are words of bits. Bit i of vector n is 1 with probability p = sigmoid(l), l = sharpness
z[n, i], independently of the others, which makes P[n, c] the probability of code c. Wanted are

    each      = mean_n H(P[n, :]) = sum h(l) / N          h(l) = log(1 + e^-|l|) + |l| sigmoid(-|l|)
    together  = H(M) = -sum_c M[c] log M[c]               M = mean_n P[n, :]

P is never made. The bits are split in two halves, whose words a and b have A[n, a] and B[n, b]:

    forward   M[a, b] = sum_n A[n, a] B[n, b] / N
    backward  dM = -dtogether log M,  0 where M is
              dA = B dM^T / N,  dB = A dM / N
              dl = sum_a dA A (bit_i(a) - p) - deach l p (1 - p) / N       for a bit i of a, as of b
              dz = sharpness dl
    kept      z, which the caller holds, and M

The derivative of -M log M is -(log M + 1), of which the 1 has no effect: M sums to 1 whatever z is.
For 18 bits a vector costs two rows of 512 numbers rather than one of 262144.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.sharding import with_auto_axes

_SURE = 1e3
"""Log odds at which a probability is 1 in float64 as well."""


class Residuals(NamedTuple):
    """What the backward of `code_entropy` keeps."""

    z: jax.Array
    mean: jax.Array
    sharpness: float


@custom_vjp
def code_entropy(z: jax.Array, sharpness: float) -> tuple[jax.Array, jax.Array]:
    """The mean entropy of each vector's code, and the entropy of the mean.

    Args:
        z: array of shape (..., bits), float.
        sharpness: log odds of a bit per unit of z; it gets no gradient.

    Returns:
        Two numbers in float32 or wider, in nats; 0 where there are no vectors.
    """
    odds = _odds(z, sharpness)
    return _entropies(odds, _mean(odds))


def _fwd(z: jax.Array, sharpness: float) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    odds = _odds(z, sharpness)
    mean = _mean(odds)
    return _entropies(odds, mean), Residuals(z, mean, sharpness)


def _bwd(res: Residuals, cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    deach, dtogether = cotangents
    odds, mean, n = _odds(res.z, res.sharpness), res.mean, _vectors(res.z)
    dmean = -dtogether * _log(mean)
    left, right = _halves(odds)
    a, b = _words(left), _words(right)
    da, db = _product(b, dmean.T) / n, _product(a, dmean) / n
    dtogether = jnp.concatenate([_of_bits(da * a, left), _of_bits(db * b, right)], -1)
    deach = deach * odds * jax.nn.sigmoid(odds) * jax.nn.sigmoid(-odds) / n
    chex.assert_equal_shape([dtogether, deach, res.z])
    return res.sharpness * (dtogether - deach), None


code_entropy.defvjp(_fwd, _bwd)


def _odds(z: jax.Array, sharpness: float) -> jax.Array:
    (z,) = widened(z.dtype, z)
    return jnp.clip(sharpness * z, -_SURE, _SURE)


def _entropies(odds: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    distance = jnp.abs(odds)
    each = jnp.log1p(jnp.exp(-distance)) + distance * jax.nn.sigmoid(-distance)
    return jnp.sum(each) / _vectors(odds), -jnp.sum(mean * _log(mean))


def _log(mean: jax.Array) -> jax.Array:
    """Log M, 0 where M is."""
    return jnp.log(jnp.where(mean > 0, mean, 1))


def _mean(odds: jax.Array) -> jax.Array:
    """M, of shape (words of the left half, words of the right half)."""

    def mean(odds: jax.Array) -> jax.Array:
        a, b = map(_words, _halves(odds))
        leading = tuple(range(odds.ndim - 1))
        numbers = ((leading, leading), ((), ()))
        return lax.dot_general(a, b, numbers, precision=lax.Precision.HIGHEST) / _vectors(odds)

    return with_auto_axes(mean, PartitionSpec(None, None), odds)


def _halves(odds: jax.Array) -> tuple[jax.Array, jax.Array]:
    half = odds.shape[-1] // 2
    return odds[..., :half], odds[..., half:]


def _words(odds: jax.Array) -> jax.Array:
    """The probability of each word of some bits: of shape (..., 2^bits)."""
    bits = _bits(odds.shape[-1], odds.dtype).T
    ones, zeros = jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)
    return jnp.exp(_product(ones, bits) + _product(zeros, 1 - bits))


def _of_bits(dwords: jax.Array, odds: jax.Array) -> jax.Array:
    """The gradient of the log odds, given that of the logarithm of each word's probability."""
    of_ones = _product(dwords, _bits(odds.shape[-1], odds.dtype))
    return of_ones - jax.nn.sigmoid(odds) * jnp.sum(dwords, -1, keepdims=True)


def _bits(n: int, dtype: jnp.dtype) -> np.ndarray:
    """The bits of all words of n: of shape (2^n, n)."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(dtype)


def _product(rows: jax.Array, matrix: jax.Array | np.ndarray) -> jax.Array:
    return jnp.matmul(rows, matrix, precision=lax.Precision.HIGHEST)


def _vectors(z: jax.Array) -> int:
    return max(1, z.size // z.shape[-1])
