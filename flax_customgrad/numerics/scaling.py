"""Scales: exact powers of two, a quotient that is rounded once, and a floor for learned scales."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def magnitude(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The power of two that brings the largest element into [1, 2); dividing by it is exact.

    XLA multiplies by the inverse, which must not vanish either. So the power is limited: an element
    above a quarter of the largest number of the dtype comes out between 2 and 8.

    Args:
        x: array of any shape, float32 or wider.
        axes: the axes over which the largest element is found.

    Returns:
        Array of x's shape and dtype, but of size 1 along the axes, without a derivative. It is 1
        for zeros, and NaN where an element is infinite or NaN.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), tuple(axes), keepdims=True, initial=0))
    most = jnp.finfo(x.dtype).maxexp - 3
    exponent = jnp.clip(jnp.frexp(largest)[1] - 1, -most, most)
    power = jnp.ldexp(jnp.ones_like(largest), exponent)
    return jnp.where(largest == 0, 1, jnp.where(jnp.isfinite(largest), power, jnp.nan))


def quotient(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / scale`, rounded once, so that ties stay ties; NaN where x is not finite.

    XLA on a CPU multiplies by the inverse of a divisor that is broadcast. That rounds twice, and
    changes one element in four. Adding `0 * x` hides from it that the divisor is broadcast.

    Args:
        x: array of any shape, float.
        scale: array that broadcasts to x, float.

    Returns:
        Array like x.
    """
    return x / (scale + 0 * x)


def abs_floor(parameter: jax.Array, least: float = 2.0**-126) -> jax.Array:
    """The magnitude of a learned scale, at least the least one.

    Args:
        parameter: array of any shape, float32 or wider.
        least: the least magnitude, by default the least normal number of float32.

    Returns:
        Array like the parameter.
    """
    return jnp.maximum(jnp.abs(parameter), least)


def abs_floor_slope(parameter: jax.Array) -> jax.Array:
    """The derivative of `abs_floor`: -1 below 0, else 1.

    Args:
        parameter: array of any shape, float.

    Returns:
        Array of that shape, of -1 and 1.
    """
    return jnp.where(parameter < 0, -1, 1)
