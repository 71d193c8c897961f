"""Scales and division by them: a power of two that is exact, a quotient rounded once, a floor."""

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


def quotient(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The quotient, rounded once, so that ties are where they should be; NaN for a non-finite x.

    XLA on a CPU multiplies by the inverse of what is broadcast, which is rounded twice and in one
    of four elements another number; it cannot see that each element has the same divisor here.

    Args:
        x: array of any shape, float.
        scale: array that broadcasts to it, float.
    """
    return x / (scale + 0 * x)


def abs_floor(parameter: jax.Array, least: float = 2.0**-126) -> jax.Array:
    """The magnitude of a learned size, and not less than the least one.

    Args:
        parameter: array of any shape, float32 or wider.
        least: the least size, by default the least normal number of float32.
    """
    return jnp.maximum(jnp.abs(parameter), least)


def abs_floor_slope(parameter: jax.Array) -> jax.Array:
    """The derivative of `abs_floor`: -1 below 0, else 1.

    Args:
        parameter: array of any shape, float.
    """
    return jnp.where(parameter < 0, -1, 1)
