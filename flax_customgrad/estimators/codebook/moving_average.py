"""A codebook that follows the vectors of its codes (appendix A.1 of the paper).

    counts[k] <- decay counts[k] + (1 - decay) n[k]       n[k]: how many vectors have code k
    sums[k]   <- decay sums[k] + (1 - decay) s[k]         s[k]: their sum
    codes[k]  <- sums[k] / smoothed[k]                    where n[k] > 0; elsewhere it stays as it
                                                          is, to the bit
    smoothed[k] = (counts[k] + epsilon) / (total + num_codes epsilon) total,  total = sum counts

`counts` starts at 1 and `sums` at `codes`, so that their quotient is `codes` from the start.
`smoothed` is `counts` with Laplace smoothing, which would shrink unused codes towards 0 as their
counts vanish; so those are left unchanged.

Source: arXiv:1711.00937
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.contract.promotion import promoting
from flax_customgrad.estimators.codebook.quantize_vectors import sum_by_code
from flax_customgrad.estimators.codebook.usage import count_by_code
from flax_customgrad.numerics.sharding import AxisName, explicit_spec, with_auto_axes


class MovingAverage(NamedTuple):
    """A codebook and its statistics, in float32 or wider.

    Attributes:
        codes: array of shape (num_codes, features).
        counts: array of shape (num_codes,), the average number of vectors of each code.
        sums: array of shape (num_codes, features), the average sum of them.
    """

    codes: jax.Array
    counts: jax.Array
    sums: jax.Array


@promoting
def update_moving_average(
    state: MovingAverage,
    z: jax.Array,
    indices: jax.Array,
    decay: float,
    epsilon: float,
    axis_name: AxisName,
) -> MovingAverage:
    """The codebook after a batch.

    Args:
        state: the codebook before it.
        z: array of shape (..., features), float.
        indices: int32 array of shape (...): the number of each vector's code.
        decay: how much of the statistics stays, from 0 to below 1.
        epsilon: constant of the Laplace smoothing, positive.
        axis_name: axis of a `shard_map` or `pmap` over whose devices the statistics are summed.
    """
    n = count_by_code(indices, len(state.counts))
    s = sum_by_code(z, indices, state.sums)
    if axis_name is not None:
        n, s = lax.psum((n, s), axis_name)

    def update(state: MovingAverage, n: jax.Array, s: jax.Array) -> MovingAverage:
        counts = decay * state.counts + (1 - decay) * n
        sums = decay * state.sums + (1 - decay) * s
        total = jnp.sum(counts)
        smoothed = (counts + epsilon) / (total + len(n) * epsilon) * total
        codes = jnp.where(n[:, None] > 0, sums / smoothed[:, None], state.codes)
        return MovingAverage(codes, counts, sums)

    return with_auto_axes(update, partition_specs(state), state, n, s)


def partition_specs(state: MovingAverage) -> Any:
    """The `PartitionSpec` of each array of a state on a mesh with Explicit axes."""
    return jax.tree.map(explicit_spec, state)
