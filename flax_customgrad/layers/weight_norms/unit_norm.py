"""`inverse_norm`: the factor that gives a weight unit norm, whatever the size of its elements.

    r = 1 / sqrt(S + epsilon min(1, S / 1e-6)),   S = sum(w^2)

flax.nnx adds epsilon, 1e-12 by default, to every `S`, which leaves a kernel of 1e-7 91 % short of
unit norm. Here a weight whose norm is 1e-3 or more comes out as in nnx, to the bit in float32;
below that, epsilon counts in proportion. Zeros, of which nothing can be normalized, are multiplied
by `1 / sqrt(epsilon)`, as in nnx, which only their gradient sees.

`S = power^2 squares` is summed in float32, of `w / power`, where power is a power of two that
brings the largest element to 1 or more and below 2: as they are, the squares would overflow from
256 on in float16 and from 1.8e19 on in float32, and vanish below 1e-23.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.numerics.scaling import magnitude

_SMALL = 1e-6
"""The `S` from which on epsilon counts in full."""


def inverse_norm(w: jax.Array, axes: Sequence[int], epsilon: float) -> jax.Array:
    """The factor by which to multiply for unit norm.

    Args:
        w: array of any shape, float.
        axes: the axes to sum over.
        epsilon: keeps the inverse norm of zeros finite; where it is 0 itself, or lost in the dtype
            of w, the smallest normal number of that dtype takes its place.

    Returns:
        The inverse norms in float32, or wider where w is wider; the summed axes stay, with size 1.
    """
    of_zeros = max(epsilon, float(jnp.finfo(w.dtype).tiny)) ** -0.5
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    # The result does not depend on what w is divided by, so neither do its derivatives.
    power = magnitude(w, axes)
    squares = jnp.sum((w / power) ** 2, axes, keepdims=True)
    zeros = squares == 0
    squares = jnp.where(zeros, 1, squares)
    added = jnp.minimum(epsilon / power / power, epsilon / _SMALL * squares)
    return jnp.where(zeros, of_zeros, lax.rsqrt(squares + added) / power)


def slope(r: jax.Array, epsilon: float) -> jax.Array:
    """The derivative of `1 / r^2` with respect to `S`.

    Args:
        r: what `inverse_norm` returned.
        epsilon: the same as there.
    """
    small = r > (_SMALL + epsilon) ** -0.5
    return jnp.where(small, 1 + epsilon / _SMALL, 1).astype(r.dtype)
