"""Gradient reversal: the identity, whose backward changes the sign of the cotangent.

    forward   y  = x
    backward  dx = -strength g
    kept      strength

Between features and a classifier of domains it makes domain-adversarial training of one ordinary
gradient step: the classifier learns to tell the domains apart, the features to give it nothing to
tell. The operation is `scale_cotangent`, with the scale `-strength`.

Source: arXiv:1505.07818
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.gradients.shaping.scale import scale_cotangent
from flax_customgrad.gradients.shaping.shaping_arguments import (
    NumberOrArray,
    Schedule,
    check_broadcasts,
    check_number_or_array,
    check_setting,
    map_arrays,
    value_at_step,
)


def gradient_reversal(x: Any, strength: NumberOrArray = 1.0) -> Any:
    """The identity, with a gradient that changes its sign.

    Args:
        x: array of any shape, or a tree of arrays. Integers have no gradient and pass as they are.
        strength: what the gradient is multiplied by, apart from -1: a number, or an array that
            broadcasts to x. It gets no gradient.

    Returns:
        x.

    Raises:
        TypeError: the strength is no real number or array.
        ValueError: the strength is a number that is not finite, or an array that does not
            broadcast to x.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.grad(lambda x: fcg.gradient_reversal(x, 0.5) ** 2)(3.0)
        Array(-3., dtype=float32)

    Source: arXiv:1505.07818
    """
    strength = check_number_or_array("gradient_reversal: strength", strength)

    def shape(x: jax.Array) -> jax.Array:
        check_broadcasts("gradient_reversal: strength", strength, x)
        return scale_cotangent(x, -strength) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return map_arrays(shape, x)


class GradientReversal(nnx.Module):
    """The identity, with a gradient that changes its sign.

    Attributes:
        strength: a number; an array or a Variable of one, which may be replaced without compiling
            anew; or a schedule, a function of a step such as those of optax.

    Raises:
        TypeError: the strength is none of these.
        ValueError: the strength is a number that is not finite.

    Example:
        The schedule of the paper, from 0 to 1 in a thousand steps.

        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> layer = fcg.GradientReversal(lambda step: jnp.tanh(5 * step / 1000))
        >>> gradient = jax.grad(lambda x, step: layer(x, step) ** 2)
        >>> [round(float(gradient(3.0, step)), 2) for step in (10, 100, 1000)]
        [-0.3, -2.77, -6.0]

    Source: arXiv:1505.07818
    """

    def __init__(self, strength: NumberOrArray | Schedule = 1.0):
        self.strength = check_setting("GradientReversal: strength", strength)

    def __call__(self, x: Any, step: Any = None) -> Any:
        """Applies the layer.

        Args:
            x: array of any shape, or a tree of arrays.
            step: what the schedule takes, if there is one; not looked at otherwise.

        Returns:
            x.

        Raises:
            TypeError: the strength is a schedule and there is no step.
            ValueError: the strength does not broadcast to x.
        """
        strength = value_at_step("GradientReversal: strength", self.strength, step)
        return gradient_reversal(x, strength)
