"""tanh and sigmoid: their derivatives are functions of what they return.

    tanh      y = tanh(x)               dx = g (1 - y^2)
    sigmoid   y = 1 / (1 + exp(-x))     dx = g y (1 - y)
    kept      y; in half precision x, with dx from e = exp(-|x|): 4 g e^2 / (1 + e^2)^2 for tanh,
              g e / (1 + e)^2 for the sigmoid

By the quotient rule:

    tanh      1 - sinh(x)^2 / cosh(x)^2 = 1 - y^2
    sigmoid   exp(-x) / (1 + exp(-x))^2 = y (1 - y)

Rounded to half precision y is soon 1 (tanh in bfloat16 from x = 3.5 on), and 1 - y then 0, which it
is in float32 from tanh(9) and sigmoid(17) on, as in flax.nnx.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flax_customgrad.layers.activation.pointwise import Pointwise, keep_output
from flax_customgrad.numerics.dtypes import as_array, is_half
from flax_customgrad.numerics.hyperbolic import sech_squared


def _tanh_backward(g: jax.Array, y: jax.Array) -> jax.Array:
    return g * (1 - y * y)


def _tanh_backward_of_input(g: jax.Array, x: jax.Array) -> jax.Array:
    return g * sech_squared(x)


TANH = Pointwise(jnp.tanh, jnp.tanh, _tanh_backward, keep_output)
TANH_OF_INPUT = Pointwise(jnp.tanh, jnp.tanh, _tanh_backward_of_input)


def tanh(x: ArrayLike) -> jax.Array:
    """The hyperbolic tangent.

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.tanh)(0.0)
        Array(1., dtype=float32, weak_type=True)
    """
    x = as_array(x)
    return (TANH_OF_INPUT if is_half(x) else TANH)(x)


def _sigmoid_backward(g: jax.Array, y: jax.Array) -> jax.Array:
    return g * (y * (1 - y))


def _sigmoid_backward_of_input(g: jax.Array, x: jax.Array) -> jax.Array:
    return g * (sech_squared(x / 2) / 4)


SIGMOID = Pointwise(jax.nn.sigmoid, lax.logistic, _sigmoid_backward, keep_output)
SIGMOID_OF_INPUT = Pointwise(jax.nn.sigmoid, lax.logistic, _sigmoid_backward_of_input)


def sigmoid(x: ArrayLike) -> jax.Array:
    """The sigmoid or logistic function, 1 / (1 + exp(-x)).

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.sigmoid)(0.0)
        Array(0.25, dtype=float32, weak_type=True)
    """
    x = as_array(x)
    return (SIGMOID_OF_INPUT if is_half(x) else SIGMOID)(x)
