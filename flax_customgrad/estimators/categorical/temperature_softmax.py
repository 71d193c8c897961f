"""The softmax at a temperature, whose gradient the estimators of this family use.

    p            = softmax(z / temperature)
    J(p) g       = p (g - sum p g)          the Jacobian of a softmax whose value is p, times g
    dz           = J(p) g / temperature
    dtemperature = -sum dz log(p)           over the axes along which the temperature was repeated

`J(p) g` adds up to 0 in each row, and that is used twice. In `dtemperature`, `log(p)` replaces
`z / temperature`, from which it differs by a number per row, so `p` alone has to be kept. And `g`
is measured from its value at the largest `p`: at a low temperature that `p` is 1 to all digits, and
the difference of `g` and `sum p g` would be nothing but rounding.

The maximum of `z` is subtracted before the division, so a small temperature can only overflow to a
`p` of 0. A row whose maximum is not finite is NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.broadcasting import sum_to_shape


def softmax_at_temperature(z: jax.Array, temperature: Any, axis: int) -> jax.Array:
    """`p`, the softmax at a temperature.

    Args:
        z: array of any shape, float32 or wider; -inf masks a class.
        temperature: a number, or an array that broadcasts against each row.
        axis: the axis that adds up to 1.

    Returns:
        Array like `z`.
    """
    largest = lax.stop_gradient(jnp.max(z, axis, keepdims=True))
    # What is masked stays out of the division: its product with a derivative of 0 would be NaN.
    is_masked = z == -jnp.inf
    e = jnp.exp(jnp.where(is_masked, 0, z - largest) / temperature)
    e = jnp.where(is_masked, 0, e)
    return e / jnp.sum(e, axis, keepdims=True)


def softmax_gradients(
    p: jax.Array, g: jax.Array, temperature: Any, axis: int
) -> tuple[jax.Array, jax.Array | None]:
    """The gradients of `softmax_at_temperature`.

    Args:
        p: its value, an array of any shape and floating dtype.
        g: the cotangent of `p`, an array like it.
        temperature: its temperature.
        axis: its axis.

    Returns:
        `dz`, of the shape of `p`, and `dtemperature`, of the shape of the temperature, None for a
        number; float32 or wider.
    """
    dtype = accumulator(p, temperature)
    p, g = p.astype(dtype), g.astype(dtype)
    dz = softmax_jacobian_product(p, g, axis) / temperature
    if not isinstance(temperature, jax.Array):
        return dz, None
    # Where p is 0, so is dz.
    log_p = jnp.log(jnp.maximum(p, jnp.finfo(dtype).tiny))
    return dz, -sum_to_shape(dz * log_p, temperature.shape)


def softmax_jacobian_product(p: jax.Array, g: jax.Array, axis: int) -> jax.Array:
    """`J(p) g`: a cotangent through a softmax.

    Args:
        p: the value of the softmax, an array of any shape, float, that adds up to 1 along the axis.
        g: the cotangent of `p`, an array like it.
        axis: that axis.

    Returns:
        Array like `p`.
    """
    # Found by a comparison: to find the place of the largest takes XLA on a CPU as long as all of
    # the rest. It may round p differently for the maximum, hence the hundredth; of several values
    # it is the mean.
    is_largest = p >= 0.99 * jnp.max(p, axis, keepdims=True)
    of_largest = jnp.sum(jnp.where(is_largest, g, 0), axis, keepdims=True)
    g = g - of_largest / jnp.sum(is_largest, axis, keepdims=True, dtype=g.dtype)
    return p * (g - jnp.sum(p * g, axis, keepdims=True))
