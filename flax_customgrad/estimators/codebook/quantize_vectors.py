"""Vectors replaced by codes, and the loss that pulls the two together.

Codebook i finds a code `q[i]` for the remainder of `z` that the codebooks before it have left:

    forward   r[0] = z
              q[i] = codebooks[i][indices[i]],  r[i] = r[i-1] - q[i]
              q    = q[1] + ... + q[n]
              loss = (commitment + 1) (sum r[1]^2 + ... + sum r[n]^2) / N      N: numbers in z
                     (commitment alone if codes learn otherwise)
    backward  dz   = E(dq) + 2 commitment dloss (r[1] + ... + r[n]) / N
              dcodebooks[i][j] = -2 dloss / N times the sum of r[i] where indices[i] = j
    kept      z and the codebooks, which the caller holds, and indices: 4 bytes a vector and
              codebook; and masks, if there are any

Each remainder is z minus constants, or a constant minus its own code:

    ∂loss/∂z    = 2 commitment (r[1] + ... + r[n]) / N          ∂r[i]/∂z = 1
    ∂loss/∂q[i] = -2 r[i] / N                                   ∂r[i]/∂q[i] = -1

and a code that several vectors found gets the sum of theirs.

A mask says which vectors a codebook quantizes. The others, such as padding, get 0 for its code and
its remainder, and what the first codebook leaves out has no gradient and is not counted by `N`.

The loss with the weight `commitment` is the commitment loss, which moves `z` only. The rest is the
codebook loss, which moves the codes only; for each codebook, the codes of the others are constants.
`E` is the gradient estimator, which passes the gradient of `q` on to `z`: unchanged for
"straight_through", and by `rotate_back` for "rotation". It does so once, whatever the number of
codebooks. Both losses are of `z` itself: of the estimator's output, which has the value of the
codes and the gradient of `z`, they would be 0, and so would their gradient.

Codes are looked up again in the backward. Losses, residuals and sums are in float32 or wider. On a
mesh with Explicit axes JAX asks where the results of a lookup and of its transpose lie:
`with_auto_axes` states that, and the compiler shards the rest.

Source: arXiv:1711.00937
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.estimators.codebook.masks import count_vectors, where_mask
from flax_customgrad.estimators.codebook.rotation_trick import rotate_back
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.sharding import explicit_spec, with_auto_axes

GradientEstimator = Literal["straight_through", "rotation"]
Codebooks = tuple[jax.Array, ...]
Indices = tuple[jax.Array, ...]
Masks = tuple[jax.Array | None, ...]


class Residuals(NamedTuple):
    """What the backward of `quantize_vectors` keeps."""

    codebooks: Codebooks
    z: jax.Array
    indices: Indices
    masks: Masks
    commitment: float
    codes_learn: bool
    gradient: GradientEstimator


@custom_vjp(surrogate=True)
def quantize_vectors(
    codebooks: Codebooks,
    z: jax.Array,
    indices: Indices,
    masks: Masks,
    commitment: float,
    codes_learn: bool,
    gradient: GradientEstimator,
) -> tuple[jax.Array, jax.Array]:
    """Replaces vectors by codes.

    Args:
        codebooks: arrays of shape (num_codes, features), float.
        z: array of shape (..., features), float.
        indices: for each codebook an int32 array of shape (...): the number of each vector's code.
        masks: for each codebook a bool array of shape (...), which vectors it quantizes; or None
            for all. Each is true for no more vectors than the one before.
        commitment: weight of the commitment loss; it gets no gradient.
        codes_learn: whether there is a codebook loss.
        gradient: the estimator that passes the gradient of `q` to `z`.

    Returns:
        `q` in the dtype of `z`, NaN where no code has the number; and the loss, a number in float32
        or wider, 0 where there are no vectors.
    """
    squares = [jnp.sum(jnp.square(r)) for r in _remainders(z, codebooks, indices, masks)]
    loss = (commitment + codes_learn) * sum(squares[1:], squares[0]) / _count(z, masks)
    return _sum_of_codes(z, codebooks, indices, masks), loss


def _fwd(
    codebooks: Codebooks,
    z: jax.Array,
    indices: Indices,
    masks: Masks,
    commitment: float,
    codes_learn: bool,
    gradient: GradientEstimator,
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    out = quantize_vectors(codebooks, z, indices, masks, commitment, codes_learn, gradient)
    return out, Residuals(codebooks, z, indices, masks, commitment, codes_learn, gradient)


def _bwd(
    res: Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[tuple[jax.Array | None, ...], jax.Array, None, None, None, None, None]:
    codebooks, z, indices, masks = res.codebooks, res.z, res.indices, res.masks
    dq, dloss = cotangents
    chex.assert_equal_shape([dq, z])
    chex.assert_rank(dloss, 0)
    chex.assert_shape(indices, z.shape[:-1])
    chex.assert_type(indices, int)
    chex.assert_shape(codebooks, (None, z.shape[-1]))
    dz = dq
    if res.gradient == "rotation":
        dz = rotate_back(dq, z, _sum_of_codes(z, codebooks, indices, masks))
    dz = where_mask(masks[0], dz)
    scale = 2 * dloss / _count(z, masks)
    dcodebooks = []
    remainders = _remainders(z, codebooks, indices, masks)
    for r, codes, numbers in zip(remainders, codebooks, indices, strict=True):
        dz += res.commitment * scale * r
        dcodebooks.append(sum_by_code(-scale * r, numbers, codes) if res.codes_learn else None)
    chex.assert_equal_shape([dz, z])
    if res.codes_learn:
        chex.assert_trees_all_equal_shapes(dcodebooks, list(codebooks))
    return tuple(dcodebooks), dz, None, None, None, None, None


quantize_vectors.defvjp(_fwd, _bwd)


def remainder(
    z: jax.Array, codes: jax.Array, indices: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """`r[1]`: the remainder that a codebook leaves of vectors.

    Args:
        z: array of shape (..., features), float.
        codes: array of shape (num_codes, features), float.
        indices: int32 array of shape (...).
        mask: bool array of shape (...), which vectors it quantizes; or None for all.

    Returns:
        Array like z, float32 or wider.
    """
    z, q = widened(jnp.result_type(z, codes), z, gather_codes(codes, indices, z, mask))
    return where_mask(mask, z - q)


def _count(z: jax.Array, masks: Masks) -> jax.Array | int:
    """`N`, how many numbers there are in the vectors that the first codebook quantizes."""
    return z.shape[-1] * count_vectors(z, masks[0])


def _remainders(
    z: jax.Array, codebooks: Codebooks, indices: Indices, masks: Masks
) -> Iterator[jax.Array]:
    """`r[1]`, `r[2]` and so on."""
    for codes, numbers, mask in zip(codebooks, indices, masks, strict=True):
        z = remainder(z, codes, numbers, mask)
        yield z


def _sum_of_codes(z: jax.Array, codebooks: Codebooks, indices: Indices, masks: Masks) -> jax.Array:
    """`q`, in the dtype of `z`."""
    codes = (
        where_mask(mask, gather_codes(c, k, z, mask))
        for c, k, mask in zip(codebooks, indices, masks, strict=True)
    )
    first, *others = widened(jnp.result_type(z, *codebooks), *codes)
    return sum(others, first).astype(z.dtype)


def gather_codes(
    codes: jax.Array, indices: jax.Array, like: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """The codes that have certain numbers.

    Args:
        codes: array of shape (num_codes, features), float.
        indices: int32 array of any shape; a number that no code has gives NaN.
        like: array of shape (*indices.shape, features) whose sharding the result has.
        mask: bool array of shape (*indices.shape,), false where any code will do; or None.

    Returns:
        Array of shape (*indices.shape, features), in the dtype of codes.
    """
    if mask is not None:
        # `jax_debug_nans` would find the NaN of a number that is left out.
        indices = jnp.where(mask, indices, 0)

    def take(codes: jax.Array, indices: jax.Array) -> jax.Array:
        return jnp.take(codes, indices, axis=0, mode="fill", fill_value=jnp.nan)

    return with_auto_axes(take, explicit_spec(like), codes, indices)


def codes_at(codes: jax.Array, indices: jax.Array) -> jax.Array:
    """The codes that have certain numbers, in the sharding of the numbers.

    Args:
        codes: array of shape (num_codes, features), float.
        indices: integers of any shape, from 0 to num_codes - 1; another number gives NaN.

    Returns:
        Array of shape (*indices.shape, features), in the dtype of codes.
    """
    indices = jnp.asarray(indices)
    indices = jnp.where((indices >= 0) & (indices < len(codes)), indices, len(codes))
    like = jnp.broadcast_to(indices[..., None], (*indices.shape, codes.shape[-1]))
    return gather_codes(codes, indices, like)


def sum_by_code(values: jax.Array, indices: jax.Array, like: jax.Array) -> jax.Array:
    """The sum of the vectors of each code, the transpose of `gather_codes`.

    Args:
        values: array of shape (*indices.shape, features), float.
        indices: int32 array of any shape; a vector of a number that no code has is left out.
        like: array of shape (num_codes, features) whose sharding the result has.

    Returns:
        Array of shape (num_codes, features), float32 or wider.
    """
    dtype = accumulator(values)

    def scatter(values: jax.Array, indices: jax.Array) -> jax.Array:
        return jnp.zeros(like.shape, dtype).at[indices].add(values.astype(dtype), mode="drop")

    return with_auto_axes(scatter, explicit_spec(like), values, indices)
