"""The random 16-point Hadamard transform along rows.

    x'[16 j + k] = sum_l H[k, l] s[l] x[16 j + l] / 4,   H the Hadamard matrix, s fixed signs

It is orthonormal: two operands that are both transformed have the product that they had. An
outlier is spread over 16 rows, which lowers the largest element of its block; the signs keep a
constant from becoming one. The signs are those of NVIDIA's TransformerEngine.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_customgrad.low_bit.microscaling.scaled_blocks import as_rows, split

SIZE = 16
_SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])


def rotated(x: jax.Array) -> jax.Array:
    """Transforms the rows of a matrix.

    Args:
        x: array of shape (rows, n), float32 or float64.

    Returns:
        Array of shape (rows', n), rows' the next multiple of 16.
    """
    matrix = np.ones((1, 1))
    while len(matrix) < SIZE:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix = jnp.asarray(matrix * _SIGNS / 4, x.dtype)
    blocks = split(x, (0,), SIZE)
    turned = jnp.einsum("kl,jln->jkn", matrix, blocks, precision=lax.Precision.HIGHEST)
    return as_rows(turned)
