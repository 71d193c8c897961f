"""Relaxation: the softmax at a temperature, whose gradient the estimators of this family borrow.

    s = (z - max z) / tau,  p = exp(s) / sum exp(s)
    J(p) g = p (g - sum p g)            the Jacobian of a softmax that is p, times g
    dz     = J(p) g / tau
    dtau   = -sum (J(p) g) s / tau      over the axes along which tau was repeated

The maximum is subtracted before the division, so a small temperature overflows to a weight of 0
and to nothing else. It is held constant: J(p) g adds up to 0 in each row, so a shift of z changes
nothing. For the same reason g may be measured from its value at the largest weight, and it is: at a
low temperature that weight is 1 to all digits, and the difference of g and sum p g would be
rounding. A row whose maximum is not finite is NaN.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.arrays import summed_to
from flax_customgrad.categorical.k_hot import largest, marked
from flax_customgrad.categorical.logits import Noise, perturbed
from flax_customgrad.sums import accumulator


def relaxed(z: jax.Array, temperature: Any, axis: int) -> jax.Array:
    """The softmax at a temperature.

    Args:
        z: array of any shape, float32 or wider; -inf masks a class.
        temperature: a number, or an array that broadcasts against each row.
        axis: the axis that adds up to 1.

    Returns:
        Array like z.
    """
    return _weights(_scaled(z, temperature, axis), axis)


class Residuals(NamedTuple):
    """What a backward through `relaxed` keeps: only what the caller holds anyway."""

    logits: jax.Array
    temperature: Any
    noise: Noise
    axis: int


def relaxed_gradient(res: Residuals, g: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The gradient of `relaxed`, for z the perturbed logits.

    Args:
        res: what was kept; the noise and p are computed again.
        g: the cotangent, an array like the logits.

    Returns:
        The gradients of the logits and of the temperature, None for that of a number.
    """
    logits, temperature, noise, axis = res
    dtype = accumulator(logits, temperature)
    s = _scaled(perturbed(logits, noise, dtype), temperature, axis)
    ds = through_softmax(_weights(s, axis), g.astype(dtype), axis)
    dlogits = ds / temperature
    chex.assert_equal_shape([dlogits, logits])
    if not isinstance(temperature, jax.Array):
        return dlogits, None
    return dlogits, -summed_to(ds * s / temperature, temperature.shape)


def through_softmax(p: jax.Array, g: jax.Array, axis: int) -> jax.Array:
    """A cotangent through a softmax whose value is p.

    Args:
        p: weights that add up to 1 along the axis.
        g: the cotangent of the softmax, an array like p.
        axis: that axis.

    Returns:
        J(p) g, an array like p.
    """
    pivot = jnp.sum(jnp.where(marked(largest(p, axis), p.shape, axis), g, 0), axis, keepdims=True)
    g = g - lax.stop_gradient(pivot)
    return p * (g - jnp.sum(p * g, axis, keepdims=True))


def _scaled(z: jax.Array, temperature: Any, axis: int) -> jax.Array:
    m = lax.stop_gradient(jnp.max(z, axis, keepdims=True))
    # Not -inf, which times a weight of 0 would be NaN.
    return jnp.maximum((z - m) / temperature, jnp.finfo(z.dtype).min)


def _weights(s: jax.Array, axis: int) -> jax.Array:
    e = jnp.exp(s)
    return e / jnp.sum(e, axis, keepdims=True)
