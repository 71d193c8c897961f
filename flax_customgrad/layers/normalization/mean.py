"""`Mean`: a mean with more digits than its dtype holds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Mean(NamedTuple):
    """A mean in two parts, each one number for all elements that share it."""

    shift: jax.Array
    """The mean, rounded."""
    correction: jax.Array
    """The mean of what the shift leaves."""

    def subtracted_from(self, x: jax.Array) -> jax.Array:
        """X less both parts, in the order in which no digit is lost."""
        return lax.sub(lax.sub(x, self.shift), self.correction)


def rounded(mean: jax.Array) -> jax.Array:
    """A mean with a bit less than its dtype has: a shift.

    Where sum / count is rounded XLA may compute x - shift without that rounding, in one pass and
    not in another. Of a shift with a bit less there is one version only.
    """
    limits = jnp.finfo(mean.dtype)
    return lax.reduce_precision(mean, limits.nexp, limits.nmant - 1)
