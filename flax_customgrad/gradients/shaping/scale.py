"""Gradient scale: the identity, whose backward multiplies the cotangent by a scale.

    forward   y  = x
    backward  dx = scale g
    kept      scale

It multiplies the gradient of everything before it: how fast a part of a model learns, without an
optimizer of its own. The scale itself gets no gradient. The product is computed in float32, or
wider where `g` is wider, and rounded once.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.gradients.shaping.shaping_arguments import (
    NumberOrArray,
    Schedule,
    check_broadcasts,
    check_number_or_array,
    check_setting,
    map_arrays,
    value_at_step,
)
from flax_customgrad.numerics.accumulation import accumulator


class Residuals(NamedTuple):
    """What the backward of `scale_cotangent` keeps."""

    scale: NumberOrArray


@custom_vjp(surrogate=True)
def scale_cotangent(x: jax.Array, scale: NumberOrArray) -> jax.Array:
    """Returns `x`.

    Args:
        x: array of any shape, float or complex.
        scale: what the backward multiplies by: a number, or an array that broadcasts to `x`.
    """
    return x


def _fwd(x: jax.Array, scale: NumberOrArray) -> tuple[jax.Array, Residuals]:
    return scale_cotangent(x, scale), Residuals(scale)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None]:
    scale = res.scale
    chex.assert_is_broadcastable(jnp.shape(scale), g.shape)
    dx = scale * g.astype(accumulator(g))
    chex.assert_equal_shape([dx, g])
    return dx, None


scale_cotangent.defvjp(_fwd, _bwd)


def gradient_scale(x: Any, scale: NumberOrArray) -> Any:
    """The identity, with a gradient that is multiplied by a scale.

    A scale of 0 multiplies as well: it makes NaN of infinity, where `stop_gradient` has 0.

    Args:
        x: array of any shape, or a tree of arrays. Integers have no gradient and pass as they are.
        scale: a number, or an array that broadcasts to x. It gets no gradient.

    Returns:
        x.

    Raises:
        TypeError: the scale is no real number or array.
        ValueError: the scale is a number that is not finite, or an array that does not broadcast
            to x.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.grad(lambda x: fcg.gradient_scale(x, 0.1) ** 2)(3.0)
        Array(0.6, dtype=float32)
    """
    scale = check_number_or_array("gradient_scale: scale", scale)

    def shape(x: jax.Array) -> jax.Array:
        check_broadcasts("gradient_scale: scale", scale, x)
        return scale_cotangent(x, scale) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return map_arrays(shape, x)


class GradientScale(nnx.Module):
    """The identity, with a gradient that is multiplied by a scale.

    Attributes:
        scale: a number; an array that broadcasts to the inputs, or a Variable of one, which may be
            replaced without compiling anew; or a schedule, a function of a step such as those of
            optax.

    Raises:
        TypeError: the scale is none of these.
        ValueError: the scale is a number that is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> layer = fcg.GradientScale(lambda step: jnp.minimum(step / 10, 1))
        >>> jax.grad(lambda x: layer(x, 5) ** 2)(3.0)
        Array(3., dtype=float32)
    """

    def __init__(self, scale: NumberOrArray | Schedule):
        self.scale = check_setting("GradientScale: scale", scale)

    def __call__(self, x: Any, step: Any = None) -> Any:
        """Applies the layer.

        Args:
            x: array of any shape, or a tree of arrays.
            step: what the schedule takes, if there is one; not looked at otherwise.

        Returns:
            x.

        Raises:
            TypeError: the scale is a schedule and there is no step.
            ValueError: the scale does not broadcast to x.
        """
        return gradient_scale(x, value_at_step("GradientScale: scale", self.scale, step))
