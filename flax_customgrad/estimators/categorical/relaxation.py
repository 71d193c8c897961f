"""Relaxation: the softmax at a temperature, whose gradient the estimators of this family borrow.

    p      = softmax(z / tau)
    J(p) g = p (g - sum p g)               the Jacobian of a softmax that is p, times g
    dz     = J(p) g / tau
    dtau   = -sum (J(p) g) log(p) / tau    over the axes along which tau was repeated

J(p) g adds up to 0 in each row, and that is used twice. In dtau log(p) stands for z / tau, from
which it differs by a number a row, so that p is all there is to keep. And g is measured from its
value at the largest weight: at a low temperature that weight is 1 to all digits, and the difference
of g and sum p g would be rounding.

The maximum of z is subtracted before the division, so a small temperature overflows to a weight of
0 and to nothing else. A row whose maximum is not finite is NaN.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.estimators.categorical.k_hot import largest, marked
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.broadcasting import sum_to_shape


def relaxed(z: jax.Array, temperature: Any, axis: int) -> jax.Array:
    """The softmax at a temperature.

    Args:
        z: array of any shape, float32 or wider; -inf masks a class.
        temperature: a number, or an array that broadcasts against each row.
        axis: the axis that adds up to 1.

    Returns:
        Array like z.
    """
    m = lax.stop_gradient(jnp.max(z, axis, keepdims=True))
    # Not -inf, whose product with the 0 that is its derivative would be NaN.
    e = jnp.exp(jnp.maximum((z - m) / temperature, jnp.finfo(z.dtype).min))
    return e / jnp.sum(e, axis, keepdims=True)


class Residuals(NamedTuple):
    """What a backward through `relaxed` keeps: p, in the dtype of the logits."""

    p: jax.Array
    temperature: Any
    axis: int


def relaxed_gradient(res: Residuals, g: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The gradient of `relaxed`.

    Args:
        res: what was kept.
        g: the cotangent, an array like p.

    Returns:
        The gradients of z and of the temperature, None for that of a number; float32 or wider.
    """
    temperature, axis = res.temperature, res.axis
    dtype = accumulator(res.p, temperature)
    p, g = res.p.astype(dtype), g.astype(dtype)
    ds = through_softmax(p, g, axis)
    dz = ds / temperature
    chex.assert_equal_shape([dz, p])
    if not isinstance(temperature, jax.Array):
        return dz, None
    # Where p is 0, so is ds.
    log_p = jnp.log(jnp.maximum(p, jnp.finfo(dtype).tiny))
    return dz, -sum_to_shape(dz * log_p, temperature.shape)


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
