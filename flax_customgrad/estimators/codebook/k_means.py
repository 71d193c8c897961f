"""k-means: codes that are the means of the vectors nearest to them, to begin with.

    codes  <- num_codes vectors, drawn at random without repetition
    codes[k] <- s[k] / n[k]       n[k]: how many vectors have code k,  s[k]: their sum

The second step is repeated; a code without vectors stays as it is.

Source: Lloyd, Least squares quantization in PCM, 1982
"""

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.contract.promotion import promoting
from flax_customgrad.estimators.codebook.moving_average import MovingAverage
from flax_customgrad.estimators.codebook.nearest_code import nearest_code
from flax_customgrad.estimators.codebook.quantize_vectors import sum_by_code
from flax_customgrad.estimators.codebook.usage import count_by_code


@promoting
def k_means(
    z: jax.Array, num_codes: int, iterations: int, key: jax.Array, mask: jax.Array | None
) -> MovingAverage:
    """A codebook for vectors, and how many of them each code has.

    Args:
        z: array of shape (n, features), float32 or wider; at least one vector.
        num_codes: how many codes. With fewer vectors some are drawn again, and have none.
        iterations: how often codes are moved.
        key: random key.
        mask: bool array of shape (n,), which vectors count; or None for all.

    Returns:
        The codes, their counts, and their sums.
    """
    counts = jnp.all(jnp.isfinite(z), -1) if mask is None else mask & jnp.all(jnp.isfinite(z), -1)
    order = jax.random.permutation(key, len(z))
    order = order[jnp.argsort(~counts[order], stable=True)]
    which = jnp.arange(num_codes) % jnp.maximum(1, jnp.sum(counts))
    z = jnp.where(counts[:, None], z, 0)

    def step(_: int, codes: jax.Array) -> jax.Array:
        n, s = assigned(codes)
        return jnp.where(n[:, None] > 0, s / jnp.maximum(n, 1)[:, None], codes)

    def assigned(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        indices = jnp.where(counts, nearest_code(z, codes), num_codes)
        return count_by_code(indices, num_codes), sum_by_code(z, indices, codes)

    codes = lax.fori_loop(0, iterations, step, z[order[which]])
    n, _ = assigned(codes)
    return MovingAverage(codes, n.astype(codes.dtype), n[:, None] * codes)
