"""The entropy of codes in nats: the mean over vectors, and that of all vectors together.

A code is a word of bits. Bit i of vector n is 1 with the log odds `odds = sharpness z[n, i]`, so
with the probability `p = sigmoid(odds)`, independently of the others; P[n, c] is the probability
of code c that follows. The two results are

    each      = mean_n H(P[n, :]) = sum h(odds) / N
                h(odds) = log(1 + e^-|odds|) + |odds| sigmoid(-|odds|)
    together  = H(mean) = -sum_c mean[c] log mean[c],  mean = mean_n P[n, :]

P is never stored. Vectors that a mask leaves out have no part in the means. The bits are split into
two halves, left and right; a[n, i] and b[n, j] are the probabilities of the words of each, and a
code is a pair of words. The operation computes `each` and `mean`:

    forward   mean[i, j] = sum_n a[n, i] b[n, j] / N
    backward  da    = b dmean^T / N,  db = a dmean / N
              dodds = sum_i da a (bits[i] - p)  for the left half, and likewise for the right one
                      - deach odds p (1 - p) / N
              dz    = sharpness dodds
    kept      z, which the caller holds

`together` follows from `mean`, which devices with vectors of their own average before: the entropy
of a mean is not the mean of the entropies. JAX differentiates that. For 18 bits a vector costs two
rows of 512 numbers rather than one of 262144.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.estimators.codebook.masks import count_vectors, where_mask
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.sharding import AxisName, with_auto_axes

_LARGEST_ODDS = 1e3
"""Log odds at which a probability is 1 in float64 as well."""


class Residuals(NamedTuple):
    """What the backward of `code_distribution` keeps: only what the caller holds anyway."""

    z: jax.Array
    sharpness: float
    mask: jax.Array | None


def code_entropy(
    z: jax.Array, sharpness: float, axis_name: AxisName = None, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The mean entropy of each vector's code, and the entropy of the mean.

    Args:
        z: array of shape (..., bits), float.
        sharpness: log odds of a bit per unit of z; it gets no gradient.
        axis_name: the axis over which arrays are parts of all vectors, or None.
        mask: bool array of shape (...), which vectors count; or None for all.

    Returns:
        Two numbers in float32 or wider, in nats; 0 where there are no vectors.
    """
    each, mean = code_distribution(z, sharpness, mask)
    if axis_name is not None and mask is not None:
        n = jnp.sum(mask, dtype=each.dtype)
        part = n / jnp.maximum(1, lax.psum(n, axis_name))
        each, mean = lax.psum((part * each, part * mean), axis_name)
    elif axis_name is not None:
        each, mean = lax.pmean((each, mean), axis_name)
    return each, -jnp.sum(mean * _log(mean))


@custom_vjp
def code_distribution(
    z: jax.Array, sharpness: float, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The mean entropy of each vector's code, and the mean probability of each code.

    Args:
        z: array of shape (..., bits), float.
        sharpness: log odds of a bit per unit of z; it gets no gradient.
        mask: bool array of shape (...), which vectors count; or None for all.

    Returns:
        A number, in nats, and an array of shape (words of the left half, words of the right half),
        in float32 or wider; 0 where there are no vectors.
    """
    odds = _odds(z, sharpness)
    size = jnp.abs(odds)
    h = jnp.log1p(jnp.exp(-size)) + size * jax.nn.sigmoid(-size)
    n = count_vectors(odds, mask)
    return jnp.sum(where_mask(mask, h)) / n, _mean(odds, n, mask)


def _fwd(
    z: jax.Array, sharpness: float, mask: jax.Array | None
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    return code_distribution(z, sharpness, mask), Residuals(z, sharpness, mask)


def _bwd(res: Residuals, cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None, None]:
    z, (deach, dmean) = res.z, cotangents
    chex.assert_rank(deach, 0)
    odds = _odds(z, res.sharpness)
    n = count_vectors(odds, res.mask)
    left, right = _halves(odds)
    a, b = _word_probabilities(left), _word_probabilities(right)
    dims = chex.Dimensions(I=2 ** left.shape[-1], J=2 ** right.shape[-1])
    chex.assert_shape(dmean, dims["IJ"])
    da, db = _product(b, dmean.T) / n, _product(a, dmean) / n
    chex.assert_shape([a, da], (*z.shape[:-1], *dims["I"]))
    chex.assert_shape([b, db], (*z.shape[:-1], *dims["J"]))
    of_left, of_right = _through_words(da * a, left), _through_words(db * b, right)
    of_together = jnp.concatenate([of_left, of_right], -1)
    of_each = deach * odds * jax.nn.sigmoid(odds) * jax.nn.sigmoid(-odds) / n
    chex.assert_equal_shape([of_together, of_each, z])
    return res.sharpness * where_mask(res.mask, of_together - of_each), None, None


code_distribution.defvjp(_fwd, _bwd)


def _odds(z: jax.Array, sharpness: float) -> jax.Array:
    (z,) = widened(z.dtype, z)
    return jnp.clip(sharpness * z, -_LARGEST_ODDS, _LARGEST_ODDS)


def _log(mean: jax.Array) -> jax.Array:
    """`log mean`, 0 where `mean` is, and so with a derivative there, unlike that of `entr`."""
    return jnp.log(jnp.where(mean > 0, mean, 1))


def _mean(odds: jax.Array, n: Any, mask: jax.Array | None) -> jax.Array:
    """`mean`, of shape (words of the left half, words of the right half)."""

    def total(odds: jax.Array, mask: jax.Array | None) -> jax.Array:
        a, b = map(_word_probabilities, _halves(odds))
        leading = tuple(range(odds.ndim - 1))
        numbers = ((leading, leading), ((), ()))
        return lax.dot_general(where_mask(mask, a), b, numbers, precision=lax.Precision.HIGHEST)

    return with_auto_axes(total, PartitionSpec(None, None), odds, mask) / n


def _halves(odds: jax.Array) -> tuple[jax.Array, jax.Array]:
    half = odds.shape[-1] // 2
    return odds[..., :half], odds[..., half:]


def _word_probabilities(odds: jax.Array) -> jax.Array:
    """The probability of each word of some bits: of shape (..., 2^bits)."""
    bits = _bits(odds.shape[-1], odds.dtype).T
    ones, zeros = jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)
    return jnp.exp(_product(ones, bits) + _product(zeros, 1 - bits))


def _through_words(dlog: jax.Array, odds: jax.Array) -> jax.Array:
    """The gradient of the log odds, given that of the logarithm of each word's probability."""
    of_ones = _product(dlog, _bits(odds.shape[-1], odds.dtype))
    return of_ones - jax.nn.sigmoid(odds) * jnp.sum(dlog, -1, keepdims=True)


def _bits(n: int, dtype: jnp.dtype) -> np.ndarray:
    """The bits of all words of n: of shape (2^n, n)."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(dtype)


def _product(rows: jax.Array, matrix: jax.Array | np.ndarray) -> jax.Array:
    return jnp.matmul(rows, matrix, precision=lax.Precision.HIGHEST)
