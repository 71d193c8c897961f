"""The result of a vector quantizer, and the share of a codebook that it uses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from flax_customgrad.contract.promotion import promoting
from flax_customgrad.numerics.sharding import AxisName, with_auto_axes

_MOST_COUNTED = 2**24
"""The largest number of codes that are counted: 67 MB of int32."""


class Quantized(NamedTuple):
    """The result of a vector quantizer for vectors of shape (..., features).

    Attributes:
        values: the codes of the vectors, of their shape and dtype, with the gradient of the
            estimator.
        indices: the numbers of the codes, int32 of shape (...), or for a `ResidualVQ` (...,
            num_quantizers).
        loss: what to add to the loss of a model, a number in float32 or wider, weights included.
        perplexity: exp of the entropy of the codes in this batch: from 1, where all vectors have
            one code, to num_codes. A float32 number; of a `ResidualVQ` one for each codebook. None
            for more than 2**24 codes, which are not counted.
        usage: the share of the codes that are used in this batch, from 0 to 1; float32, of the
            shape of perplexity, and None where that is.
    """

    values: jax.Array
    indices: jax.Array
    loss: jax.Array
    perplexity: jax.Array | None
    usage: jax.Array | None


class Usage(NamedTuple):
    """The `perplexity` and `usage` of a `Quantized`."""

    perplexity: jax.Array | None
    usage: jax.Array | None


def measure_usage(indices: jax.Array, num_codes: int, axis_name: AxisName = None) -> Usage:
    """How much of a codebook a batch uses.

    Args:
        indices: int32 array of any shape; a number that no code has is left out.
        num_codes: how many codes there are.
        axis_name: axis of a `shard_map` or `pmap` over whose devices to count.

    Returns:
        Two float32 numbers; None for more than 2**24 codes.
    """
    if num_codes > _MOST_COUNTED:
        return Usage(None, None)
    n = count_by_code(indices, num_codes)
    if axis_name is not None:
        n = lax.psum(n, axis_name)
    return Usage(codebook_perplexity(n), jnp.mean(n > 0, dtype=jnp.float32))


@promoting
def codebook_perplexity(counts: jax.Array) -> jax.Array:
    """The perplexity of a codebook: exp of the entropy of how often its codes occur.

    Args:
        counts: how often each code occurs; array of shape (num_codes,), int32 or float.

    Returns:
        A float32 number from 1 to num_codes; 1 where nothing occurs.
    """
    p = counts.astype(jnp.float32) / jnp.maximum(jnp.sum(counts), 1)
    # The logarithm of 0 times 0, which `jax_debug_nans` would find, is not computed.
    return jnp.exp(-jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)))).astype(jnp.float32)


def count_by_code(indices: jax.Array, num_codes: int) -> jax.Array:
    """How many vectors each code has.

    Args:
        indices: int32 array of any shape; a number that no code has is left out.
        num_codes: how many codes there are.

    Returns:
        int32 array of shape (num_codes,).
    """

    def count(indices: jax.Array) -> jax.Array:
        return jnp.zeros(num_codes, jnp.int32).at[indices].add(1, mode="drop")

    return with_auto_axes(count, PartitionSpec(None), indices)
