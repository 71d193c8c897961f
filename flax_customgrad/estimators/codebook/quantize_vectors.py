"""Vectors replaced by codes, and the loss that pulls the two together, arXiv:1711.00937.

One codebook after the other takes its code q[i] from what the last one has left of z:

    forward   r[0]  = z,  r[i] = r[i-1] - q[i],  q[i] = e[i][k[i]]       k: the numbers of the codes
              q     = q[1] + ... + q[n]
              loss  = (beta + 1) (mean(r[1]^2) + ... + mean(r[n]^2))     beta if codes do not learn
    backward  dz    = E(dq) + 2 beta dloss (r[1] + ... + r[n]) / N       N: how many numbers z has
              de[i][j] = -2 dloss / N times the sum of r[i] where k[i] = j
    kept      z and the codes, which the caller holds, and k: 4 bytes a vector and codebook

beta of the loss is the commitment loss, which moves z only: to each codebook, what the others took
is a constant. The rest is the codebook loss, which moves the codes only. E passes the gradient of q
on to z: as it is for straight-through, and `turned_back` for `rotation`. It does so once, whatever
the number of codebooks. Both losses are of z as it came: of the estimator's output, which has the
value of the codes and the gradient of z, they would be 0, and so would their gradient.

Codes are looked up anew in the backward. Losses, residuals and sums are in float32 or wider.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.estimators.codebook.by_code import rows, sums
from flax_customgrad.estimators.codebook.rotation_trick import turned_back
from flax_customgrad.numerics.dtypes import widened

Gradient = Literal["straight_through", "rotation"]
Codebooks = tuple[jax.Array, ...]
Indices = tuple[jax.Array, ...]


class Residuals(NamedTuple):
    """What the backward of `quantize` keeps."""

    codebooks: Codebooks
    z: jax.Array
    indices: Indices
    commitment: float
    learns: bool
    gradient: Gradient


@custom_vjp(surrogate=True)
def quantize(
    codebooks: Codebooks,
    z: jax.Array,
    indices: Indices,
    commitment: float,
    learns: bool,
    gradient: Gradient,
) -> tuple[jax.Array, jax.Array]:
    """Replaces vectors by codes.

    Args:
        codebooks: arrays of shape (num_codes, features), float.
        z: array of shape (..., features), float.
        indices: for each codebook an int32 array of shape (...): the number of each vector's code.
        commitment: weight of the commitment loss, beta; it gets no gradient.
        learns: whether there is a codebook loss.
        gradient: how the gradient of q gets to z.

    Returns:
        The sum of the codes in the dtype of z, NaN where no code has the number; and the loss, a
        number in float32 or wider, 0 where there are no vectors.
    """
    losses = [jnp.sum(jnp.square(left)) for left in _left(z, codebooks, indices)]
    loss = (commitment + learns) / max(1, z.size) * sum(losses[1:], losses[0])
    return _taken(z, codebooks, indices), loss


def _fwd(codebooks, z, indices, commitment, learns, gradient):
    out = quantize(codebooks, z, indices, commitment, learns, gradient)
    return out, Residuals(codebooks, z, indices, commitment, learns, gradient)


def _bwd(
    res: Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[tuple[jax.Array, ...] | None, jax.Array, None, None, None, None]:
    codebooks, z, indices = res.codebooks, res.z, res.indices
    g, dloss = cotangents
    scale = 2 * dloss / max(1, z.size)
    if res.gradient == "rotation":
        g = turned_back(g, z, _taken(z, codebooks, indices))
    dz, dcodebooks = g, []
    for left, codes, numbers in zip(_left(z, codebooks, indices), codebooks, indices, strict=True):
        dz += res.commitment * scale * left
        dcodebooks.append(sums(-scale * left, numbers, codes) if res.learns else None)
    chex.assert_equal_shape([dz, z])
    return tuple(dcodebooks), dz, None, None, None, None


quantize.defvjp(_fwd, _bwd)


def left_over(z: jax.Array, codes: jax.Array, indices: jax.Array) -> jax.Array:
    """What a codebook leaves of vectors: z - q, in float32 or wider.

    Args:
        z: array of shape (..., features), float.
        codes: array of shape (num_codes, features), float.
        indices: int32 array of shape (...).
    """
    z, q = widened(jnp.result_type(z, codes), z, rows(codes, indices, z))
    return z - q


def _left(z: jax.Array, codebooks: Codebooks, indices: Indices) -> Iterator[jax.Array]:
    """r[1], r[2] and so on."""
    for codes, numbers in zip(codebooks, indices, strict=True):
        z = left_over(z, codes, numbers)
        yield z


def _taken(z: jax.Array, codebooks: Codebooks, indices: Indices) -> jax.Array:
    """The sum of the codes, in the dtype of z."""
    codes = (rows(c, k, z) for c, k in zip(codebooks, indices, strict=True))
    first, *others = widened(jnp.result_type(z, *codebooks), *codes)
    return sum(others, first).astype(z.dtype)
