"""Distances by which codes are found: of vectors and codes as they are, or of their directions.

Vectors of unit norm have the squared distance 2 - 2 cos: the nearest code is the one with the
largest cosine.
"""

from typing import Literal

import jax

from flax_customgrad.contract.promotion import promoting
from flax_customgrad.estimators.codebook.nearest_code import nearest_code
from flax_customgrad.layers.weight_norms.unit_norm import inverse_norm

Distance = Literal["euclidean", "cosine"]


def nearest_direction(x: jax.Array, codes: jax.Array) -> jax.Array:
    """The number of the code with the largest cosine to each vector.

    Args:
        x: array of shape (..., features), float.
        codes: array of shape (num_codes, features), float.

    Returns:
        int32 array of shape (...), as of `nearest_code`.
    """
    return nearest_code(unit_vectors(x), unit_vectors(codes))


@promoting
def unit_vectors(x: jax.Array) -> jax.Array:
    """Vectors scaled to unit norm; zeros stay zeros.

    Args:
        x: array of shape (..., features), float.

    Returns:
        Array like x.
    """
    return (x * inverse_norm(x, (-1,), 1e-12)).astype(x.dtype)
