"""k-means: codes that are the means of the vectors nearest to them, to begin with.

    codes  <- num_codes vectors, drawn at random without repetition
    codes[k] <- s[k] / n[k]       n[k]: how many vectors have code k,  s[k]: their sum

The second step is repeated; a code without vectors stays as it is.

Source: Lloyd, Least squares quantization in PCM, 1982
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.promotion import promoting
from flax_customgrad.estimators.codebook.codebook_arguments import check_mask, check_vectors
from flax_customgrad.estimators.codebook.distance import unit_vectors
from flax_customgrad.estimators.codebook.moving_average import MovingAverage
from flax_customgrad.estimators.codebook.nearest_code import nearest_code
from flax_customgrad.estimators.codebook.quantize_vectors import sum_by_code
from flax_customgrad.estimators.codebook.usage import count_by_code
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_size

Nearest = Callable[[jax.Array, jax.Array], jax.Array]


def initial_codes(
    layer: str,
    z: Any,
    shape: tuple[int, int],
    iterations: int,
    mask: Any,
    rngs: nnx.Rngs,
    unit: bool,
    nearest: Nearest = nearest_code,
) -> MovingAverage:
    """A codebook for the vectors that a user hands a layer, checked.

    Args:
        layer: the name of the layer, for the error.
        z: array of shape (..., features), float; at least one vector.
        shape: that of the codebook.
        iterations: how often codes are moved, at least once.
        mask: bool array of shape (...), which vectors count; or None for all.
        rngs: `codebook`, for the vectors that the codes begin as.
        unit: whether vectors are scaled to unit norm.
        nearest: finds the number of each vector's code.

    Returns:
        The codes, their counts, and their sums, float32 or wider.

    Raises:
        TypeError: z is not a floating array, or mask not one of bool.
        ValueError: z has another number of features, no vector, or mask another shape;
            `iterations` is below 1.
    """
    num_codes, features = shape
    z = check_vectors(layer, z, features)
    mask = check_mask(layer, mask, z)
    iterations = check_size(layer, "iterations", iterations)
    if not z.size:
        raise ValueError(f"{layer}: z has shape {z.shape}: there are no vectors to begin with")
    if unit:
        z = unit_vectors(z)
    z = lax.stop_gradient(z).astype(accumulator(z)).reshape(-1, features)
    mask = None if mask is None else mask.ravel()
    return k_means(z, num_codes, iterations, rngs["codebook"](), mask, nearest)


@promoting
def k_means(
    z: jax.Array,
    num_codes: int,
    iterations: int,
    key: jax.Array,
    mask: jax.Array | None,
    nearest: Nearest = nearest_code,
) -> MovingAverage:
    """A codebook for vectors, and how many of them each code has.

    Args:
        z: array of shape (n, features), float32 or wider; at least one vector.
        num_codes: how many codes. With fewer vectors some are drawn again, and have none.
        iterations: how often codes are moved.
        key: random key.
        mask: bool array of shape (n,), which vectors count; or None for all.
        nearest: finds the number of each vector's code.

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
        indices = jnp.where(counts, nearest(z, codes), num_codes)
        return count_by_code(indices, num_codes), sum_by_code(z, indices, codes)

    codes = lax.fori_loop(0, iterations, step, z[order[which]])
    n, _ = assigned(codes)
    return MovingAverage(codes, n.astype(codes.dtype), n[:, None] * codes)
