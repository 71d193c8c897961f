"""Exponential linear units: the identity for x > 0, an exponential below.

For x <= 0:

    elu    y  = alpha (exp(x) - 1)
           dx = g alpha exp(x),  dalpha = sum g (exp(x) - 1)
    selu   y  = scale elu(x, alpha), with the scale and the alpha of its paper
           dx = g scale alpha exp(x)
    celu   y  = alpha (exp(t) - 1),  t = x / alpha
           dx = g exp(t),  dalpha = sum g (exp(t) - 1 - t exp(t))
    kept   x and alpha

For x > 0, y = x and dx = g, for selu both times scale, and dalpha = 0.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_customgrad.layers.activation.pointwise import Pointwise


def _elu(x: jax.Array, alpha: ArrayLike) -> jax.Array:
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0)))


def _elu_backward(g: jax.Array, x: jax.Array, alpha: ArrayLike) -> jax.Array:
    return jnp.where(x > 0, g, g * (alpha * jnp.exp(jnp.minimum(x, 0))))


def _elu_backward_alpha(g: jax.Array, x: jax.Array, alpha: ArrayLike) -> jax.Array:
    return g * jnp.expm1(jnp.minimum(x, 0))


ELU = Pointwise(jax.nn.elu, _elu, _elu_backward, parameter_backwards=(_elu_backward_alpha,))


def elu(x: ArrayLike, alpha: ArrayLike = 1.0) -> jax.Array:
    """The exponential linear unit, x for x > 0 and alpha (exp(x) - 1) below.

    Args:
        x: array of any shape.
        alpha: a number, or an array that broadcasts against x.

    Returns:
        Array like x, of the dtype to which x and alpha promote.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.grad(fcg.elu)(-jnp.inf)
        Array(0., dtype=float32, weak_type=True)

    Source: arXiv:1511.07289
    """
    return ELU(x, alpha)


_ALPHA = 1.6732632423543772848170429916717
_SCALE = 1.0507009873554804934193349852946


def _selu(x: jax.Array) -> jax.Array:
    return _SCALE * _elu(x, _ALPHA)


def _selu_backward(g: jax.Array, x: jax.Array) -> jax.Array:
    return _SCALE * _elu_backward(g, x, _ALPHA)


SELU = Pointwise(jax.nn.selu, _selu, _selu_backward)


def selu(x: ArrayLike) -> jax.Array:
    """The scaled exponential linear unit, whose constants keep mean 0 and variance 1.

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.grad(fcg.selu)(-jnp.inf)
        Array(0., dtype=float32, weak_type=True)

    Source: arXiv:1706.02515
    """
    return SELU(x)


def _celu(x: jax.Array, alpha: ArrayLike) -> jax.Array:
    return jnp.maximum(x, 0) + alpha * jnp.expm1(jnp.minimum(x, 0) / alpha)


def _celu_backward(g: jax.Array, x: jax.Array, alpha: ArrayLike) -> jax.Array:
    return g * jnp.exp(jnp.minimum(x, 0) / alpha)


def _celu_backward_alpha(g: jax.Array, x: jax.Array, alpha: ArrayLike) -> jax.Array:
    # Clipped, so that t exp(t) is 0 at minus infinity.
    t = jnp.maximum(jnp.minimum(x, 0) / alpha, -1e3)
    return g * (jnp.expm1(t) - t * jnp.exp(t))


CELU = Pointwise(jax.nn.celu, _celu, _celu_backward, parameter_backwards=(_celu_backward_alpha,))


def celu(x: ArrayLike, alpha: ArrayLike = 1.0) -> jax.Array:
    """The continuously differentiable exponential linear unit, alpha (exp(x / alpha) - 1) below 0.

    Args:
        x: array of any shape.
        alpha: a number, or an array that broadcasts against x; not 0.

    Returns:
        Array like x, of the dtype to which x and alpha promote.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.grad(fcg.celu)(-jnp.inf)
        Array(0., dtype=float32, weak_type=True)

    Source: arXiv:1704.07483
    """
    return CELU(x, alpha)
