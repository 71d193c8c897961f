"""Dead codes, which hardly any vector has, are replaced by vectors of the batch (section 3.1).

A code whose count is below a threshold becomes a vector of the batch, drawn at random; its count
becomes the threshold and its sum that times the code, so that it is dead again unless the next
batch has vectors for it. No vector is drawn twice, as the nearest code to a vector is one of its
copies alone: with more dead codes than vectors, the rest wait for the next batch.

Source: arXiv:2005.00341
"""

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.contract.promotion import promoting
from flax_customgrad.estimators.codebook.moving_average import MovingAverage, partition_specs
from flax_customgrad.numerics.sharding import AxisName, with_auto_axes


@promoting
def replace_dead_codes(
    state: MovingAverage,
    z: jax.Array,
    threshold: float,
    key: jax.Array,
    axis_name: AxisName,
    mask: jax.Array | None = None,
) -> MovingAverage:
    """Replaces the dead codes of a codebook.

    Args:
        state: the codebook and its statistics.
        z: array of shape (..., features), float: the batch; at least one vector.
        threshold: the count below which a code is dead.
        key: random key, the same on all devices.
        axis_name: axis of a `shard_map` or `pmap`, whose devices contribute vectors in turn.
        mask: bool array of shape (...), which vectors may be drawn; or None for all.

    Returns:
        The codebook and its statistics after that.
    """

    def replace(
        state: MovingAverage, z: jax.Array, key: jax.Array, mask: jax.Array | None
    ) -> MovingAverage:
        vectors, is_drawn = _draw_vectors(state.counts < threshold, z, key, axis_name, mask)
        codes = jnp.where(is_drawn[:, None], vectors, state.codes)
        counts = jnp.where(is_drawn, threshold, state.counts)
        sums = jnp.where(is_drawn[:, None], threshold * codes, state.sums)
        return MovingAverage(codes, counts, sums)

    z = z.astype(state.codes.dtype)
    return with_auto_axes(replace, partition_specs(state), state, z, key, mask)


def _draw_vectors(
    is_dead: jax.Array,
    z: jax.Array,
    key: jax.Array,
    axis_name: AxisName,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """A vector for each dead code, and the codes for which there is one, finite."""
    z = z.reshape(-1, z.shape[-1])
    order = jax.random.permutation(key, len(z))
    if mask is not None:
        # What is left out comes last, and is nothing to draw: it is not finite.
        z = jnp.where(mask.reshape(-1, 1), z, jnp.inf)
        order = order[jnp.argsort(~mask.reshape(-1)[order], stable=True)]
    rank = jnp.cumsum(is_dead) - 1  # among the dead codes
    devices, device = 1, 0
    if axis_name is not None:
        devices, device = lax.axis_size(axis_name), lax.axis_index(axis_name)
    vectors = z[order[jnp.minimum(rank // devices, len(z) - 1)]]
    if axis_name is not None:
        vectors = lax.psum(jnp.where((rank % devices == device)[:, None], vectors, 0), axis_name)
    found = (rank < len(z) * devices) & jnp.all(jnp.isfinite(vectors), -1)
    return vectors, is_dead & found
