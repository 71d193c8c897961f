"""`operand`: a number that XLA compiles no kernel anew for."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def operand(value: Any, dtype: Any) -> jax.Array:
    """A number as an operand of what uses it, in the place of a constant.

    XLA on a CPU compiles a kernel once for all that are equal. Those of arrays of one shape differ
    by their constants alone: in a U-Net the sums of a group are divided by another count in each
    stage.

    Args:
        value: a number that is known where the program is traced.
        dtype: its dtype.
    """
    return lax.optimization_barrier(jnp.asarray(value, dtype))
