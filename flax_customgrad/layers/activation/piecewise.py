"""Piecewise linear activations, which keep the piece that x lies on; and hard_silu.

    relu           max(x, 0)                  dx = g where x > 0
    relu6          min(max(x, 0), 6)          dx = g where 0 < x < 6
    hard_tanh      min(max(x, -1), 1)         dx = g where -1 <= x <= 1
    hard_sigmoid   relu6(x + 3) / 6           dx = g / 6 where -3 < x < 3
    leaky_relu     x, and slope x for x < 0   dx = g, and slope g for x < 0
    hard_silu      x hard_sigmoid(x)          dx = g (hard_sigmoid(x) + x / 6 where -3 < x < 3)
    kept           a mask, one byte an element; hard_silu keeps x

At a bend the derivative is that of flax.nnx, which is what stands above.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_customgrad.layers.activation.pointwise import Pointwise, keep_output
from flax_customgrad.numerics.argument_checks import check_word
from flax_customgrad.numerics.dtypes import is_python_number
from flax_customgrad.numerics.packing import masked, pack_mask

# relu, which leaves the choice of what is kept.


def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def _is_positive(x: jax.Array, y: jax.Array) -> jax.Array:
    return x > 0


def _positive_bits(x: jax.Array, y: jax.Array) -> jax.Array:
    return pack_mask(x > 0)


def _relu_backward(g: jax.Array, x_or_y: jax.Array) -> jax.Array:
    return jnp.where(x_or_y > 0, g, 0)


RELU = {
    "mask": Pointwise(jax.nn.relu, _relu, masked, _is_positive, selects=True),
    "bits": Pointwise(jax.nn.relu, _relu, masked, _positive_bits, selects=True),
    "output": Pointwise(jax.nn.relu, _relu, _relu_backward, keep_output, selects=True),
}
RELU_OF_INPUT = Pointwise(jax.nn.relu, _relu, _relu_backward, selects=True)


def relu(x: ArrayLike, *, residual: Literal["mask", "bits", "output"] = "mask") -> jax.Array:
    """The rectified linear unit, max(x, 0), with derivative 0 at 0.

    Args:
        x: array of any shape.
        residual: what the backward keeps. "mask": a byte an element, as nnx does. "bits": a bit an
            element, eight of the last axis in a byte, for the time that packing takes. "output":
            y, which costs nothing where the next layer keeps its input anyway, as a Linear does.

    Returns:
        Array like x.

    Raises:
        ValueError: `residual` is none of these words.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.relu)(2.0)
        Array(1., dtype=float32, weak_type=True)
    """
    check_word("relu", "residual", residual, RELU)
    return RELU[residual](x)


# relu6 and hard_tanh


def _relu6(x: jax.Array) -> jax.Array:
    return jnp.clip(x, 0, 6)


def _between_0_and_6(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x > 0) & (x < 6)


def _hard_tanh(x: jax.Array) -> jax.Array:
    return jnp.where(x > 1, 1, jnp.where(x < -1, -1, x))


def _not_beyond_1(x: jax.Array, y: jax.Array) -> jax.Array:
    return ~(jnp.abs(x) > 1)


RELU6 = Pointwise(jax.nn.relu6, _relu6, masked, _between_0_and_6, selects=True)
HARD_TANH = Pointwise(jax.nn.hard_tanh, _hard_tanh, masked, _not_beyond_1, selects=True)


def relu6(x: ArrayLike) -> jax.Array:
    """The rectified linear unit up to 6, min(max(x, 0), 6).

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.relu6)(7.0)
        Array(0., dtype=float32, weak_type=True)
    """
    return RELU6(x)


def hard_tanh(x: ArrayLike) -> jax.Array:
    """The hard tanh, min(max(x, -1), 1).

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.hard_tanh)(0.5)
        Array(1., dtype=float32, weak_type=True)
    """
    return HARD_TANH(x)


# hard_sigmoid and hard_silu


def _hard_sigmoid(x: jax.Array) -> jax.Array:
    return jnp.clip(x + 3, 0, 6) / 6


def _within_3(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.abs(x) < 3


def _hard_sigmoid_backward(g: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, g / 6, 0)


def _hard_silu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, -3) * _hard_sigmoid(x)


def _hard_silu_backward(g: jax.Array, x: jax.Array) -> jax.Array:
    return g * (_hard_sigmoid(x) + jnp.where(jnp.abs(x) < 3, x / 6, 0))


HARD_SIGMOID = Pointwise(jax.nn.hard_sigmoid, _hard_sigmoid, _hard_sigmoid_backward, _within_3)
HARD_SILU = Pointwise(jax.nn.hard_silu, _hard_silu, _hard_silu_backward)


def hard_sigmoid(x: ArrayLike) -> jax.Array:
    """The hard sigmoid, relu6(x + 3) / 6.

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import flax_customgrad as fcg
        >>> fcg.hard_sigmoid(0.0)
        Array(0.5, dtype=float32, weak_type=True)
    """
    return HARD_SIGMOID(x)


def hard_silu(x: ArrayLike) -> jax.Array:
    """The hard SiLU, x relu6(x + 3) / 6; `hard_swish` is another name for it.

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.grad(fcg.hard_silu)(-jnp.inf)
        Array(0., dtype=float32, weak_type=True)
    """
    return HARD_SILU(x)


hard_swish = hard_silu


# leaky_relu, whose slope may be trained; its gradient needs x.


def _leaky_relu(x: jax.Array, slope: ArrayLike) -> jax.Array:
    return jnp.where(x >= 0, x, slope * x)


def _not_negative(x: jax.Array, y: jax.Array) -> jax.Array:
    return x >= 0


def _leaky_relu_backward(g: jax.Array, mask: jax.Array, slope: ArrayLike) -> jax.Array:
    return jnp.where(mask, g, slope * g)


def _leaky_relu_backward_of_input(g: jax.Array, x: jax.Array, slope: ArrayLike) -> jax.Array:
    return jnp.where(x >= 0, g, slope * g)


def _leaky_relu_backward_slope(g: jax.Array, x: jax.Array, slope: ArrayLike) -> jax.Array:
    return jnp.where(x >= 0, 0, g * x)


LEAKY_RELU = Pointwise(jax.nn.leaky_relu, _leaky_relu, _leaky_relu_backward, _not_negative)
LEAKY_RELU_OF_INPUT = Pointwise(
    jax.nn.leaky_relu,
    _leaky_relu,
    _leaky_relu_backward_of_input,
    parameter_backwards=(_leaky_relu_backward_slope,),
)


def leaky_relu(x: ArrayLike, negative_slope: ArrayLike = 1e-2) -> jax.Array:
    """The leaky rectified linear unit, x for x >= 0 and negative_slope x below.

    Args:
        x: array of any shape.
        negative_slope: a number; or an array that broadcasts against x, which gets a gradient, for
            which x is kept.

    Returns:
        Array like x, of the dtype to which x and the slope promote.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.leaky_relu)(2.0)
        Array(1., dtype=float32, weak_type=True)
    """
    f = LEAKY_RELU if is_python_number(negative_slope) else LEAKY_RELU_OF_INPUT
    return f(x, negative_slope)
