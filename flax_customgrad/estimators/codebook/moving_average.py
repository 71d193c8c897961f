"""A codebook that follows the vectors of its codes, arXiv:1711.00937 (appendix A.1).

    N[k] <- decay N[k] + (1 - decay) n[k]       n[k]: how many vectors have code k
    m[k] <- decay m[k] + (1 - decay) s[k]       s[k]: their sum
    e[k] <- m[k] / N~[k]                        where n[k] > 0; elsewhere e[k] stays, to the bit
    N~[k] = (N[k] + epsilon) / (sum N + num_codes epsilon) sum N

N starts at 1 and m at e, so that m / N is e from the start. N~ is N with Laplace smoothing, which
would shrink codes that nobody uses towards 0 as their N vanishes; they are left alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.estimators.codebook.by_code import counts, sums
from flax_customgrad.estimators.codebook.usage import AxisName
from flax_customgrad.numerics.sharding import explicit_spec, with_auto_axes


class MovingAverage(NamedTuple):
    """A codebook and its statistics, in float32 or wider.

    Attributes:
        codes: array of shape (num_codes, features), e.
        counts: array of shape (num_codes,), N.
        sums: array of shape (num_codes, features), m.
    """

    codes: jax.Array
    counts: jax.Array
    sums: jax.Array


def followed(
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
        epsilon: of Laplace smoothing, positive.
        axis_name: axis of a `shard_map` or `pmap` over whose devices the statistics are summed.
    """
    n, s = counts(indices, len(state.counts)), sums(z, indices, state.sums)
    if axis_name is not None:
        n, s = lax.psum((n, s), axis_name)

    def mix(state: MovingAverage, n: jax.Array, s: jax.Array) -> MovingAverage:
        new_counts = decay * state.counts + (1 - decay) * n
        new_sums = decay * state.sums + (1 - decay) * s
        total = jnp.sum(new_counts)
        smoothed = (new_counts + epsilon) / (total + len(n) * epsilon) * total
        codes = jnp.where(n[:, None] > 0, new_sums / smoothed[:, None], state.codes)
        return MovingAverage(codes, new_counts, new_sums)

    return with_auto_axes(mix, specs(state), state, n, s)


def specs(state: MovingAverage) -> Any:
    """Where each array of a state lies on a mesh with Explicit axes."""
    return jax.tree.map(explicit_spec, state)
