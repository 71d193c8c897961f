"""`magnitude`: a power of two to divide by, so that squares neither overflow nor vanish."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def magnitude(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The power of two that brings the largest element into [1, 2); dividing by it is exact.

    XLA multiplies by the inverse, which must not vanish either: an element beyond a quarter of the
    largest number there is comes out between 2 and 8.

    Args:
        x: array of any shape, float32 or wider.
        axes: over which axes an element is the largest.

    Returns:
        Array of x's shape but of size 1 along the axes, a constant to every derivative. For zeros
        it is 1; where an element is infinite or NaN it is NaN.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), tuple(axes), keepdims=True, initial=0))
    most = jnp.finfo(x.dtype).maxexp - 3
    exponent = jnp.clip(jnp.frexp(largest)[1] - 1, -most, most)
    power = jnp.ldexp(jnp.ones_like(largest), exponent)
    return jnp.where(largest == 0, 1, jnp.where(jnp.isfinite(largest), power, jnp.nan))
