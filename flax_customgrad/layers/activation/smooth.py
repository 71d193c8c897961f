"""Smooth activations, and their derivatives as functions of x alone.

With s the sigmoid, s(x) = 1 / (1 + exp(-x)), P the normal distribution function,
a = 2 sqrt(2 / pi) and c = 0.044715 a:

    gelu, erf    y = x P(x)                         dx = g (P(x) + x exp(-x^2 / 2) / sqrt(2 pi))
    gelu, tanh   y = x s(x (a + c x^2))             dx = g s (1 + x (1 - s) (a + 3 c x^2))
    silu         y = x s(x)                         dx = g s (1 + x (1 - s))
    mish         y = x n / (n + 2)                  dx = g (n r + 4 x e r (1 + e) r)
                 e = exp(x),  n = e (e + 2)         r  = 1 / (n + 2)
    softplus     y = log(1 + exp(x))                dx = g s(x)
    log_sigmoid  y = -log(1 + exp(-x))              dx = g s(-x)
    squareplus   y = (x + r) / 2                    dx = g y / r,  db = sum g / (4 r)
                 r = sqrt(x^2 + b)
    soft_sign    y = x / (1 + |x|)                  dx = g / (1 + |x|)^2
    kept         x, and b

The derivatives, by the product rule and s' = s (1 - s):

    gelu, erf    dx = g (P + x P'),  P'(x) = exp(-x^2 / 2) / sqrt(2 pi)
    gelu, tanh   dx = g (s + x s (1 - s) w'),  w = x (a + c x^2),  w' = a + 3 c x^2
    silu         dx = g (s + x s (1 - s))
    softplus     dx = g exp(x) / (1 + exp(x)) = g s(x)
    squareplus   dx = g (1 + x / r) / 2 = g (r + x) / (2 r) = g y / r

Where a formula meets 0 times infinity, x is clipped at a bound beyond which the function equals its
limit to the last bit, in float64 too: so an infinite x has a value and a gradient. The sigmoid is
that of x itself, which XLA can share between the passes; the clips of the passes differ, because
XLA would share them too, as one more array.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flax_customgrad.layers.activation.pointwise import Pointwise
from flax_customgrad.numerics.normal_distribution import normal_density, normal_distribution

# gelu(x) = x P(x). The approximate form is x (1 + tanh(u)) / 2, which is x s(v) with v = 2 u. The
# sigmoid is taken from the tanh, which XLA computes faster than an exponential.

_A = 2 * math.sqrt(2 / math.pi)
_C = 0.044715 * _A


def _gelu_sigmoid(x: jax.Array) -> jax.Array:
    return lax.logistic(x * (_A + _C * (x * x)))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    t = jnp.tanh(x * (_A / 2 + _C / 2 * (x * x)))
    return jnp.maximum(x, -60.0) * (0.5 + 0.5 * t)


def _gelu_tanh_backward(g: jax.Array, x: jax.Array) -> jax.Array:
    s, x = _gelu_sigmoid(x), jnp.clip(x, -30.0, 30.0)
    return g * (s * (1 + x * (1 - s) * (_A + 3 * _C * (x * x))))


def _gelu_erf(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, -60.0) * normal_distribution(x)


def _gelu_erf_backward(g: jax.Array, x: jax.Array) -> jax.Array:
    # Both of x itself: they have an exponential in common.
    return g * (normal_distribution(x) + jnp.clip(x, -40.0, 40.0) * normal_density(x))


GELU_TANH = Pointwise(
    functools.partial(jax.nn.gelu, approximate=True), _gelu_tanh, _gelu_tanh_backward
)
GELU_ERF = Pointwise(
    functools.partial(jax.nn.gelu, approximate=False), _gelu_erf, _gelu_erf_backward
)


def gelu(x: ArrayLike, approximate: bool = True) -> jax.Array:
    """The Gaussian error linear unit, x times the normal distribution function of x.

    Args:
        x: array of any shape.
        approximate: whether to approximate the distribution by a tanh.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.gelu)(0.0)
        Array(0.5, dtype=float32, weak_type=True)

    Source: arXiv:1606.08415
    """
    if isinstance(x, float) or getattr(x, "weak_type", False):
        # As in nnx, whose constants have a dtype, the result is not weakly typed.
        x = jnp.asarray(x)
        x = x.astype(x.dtype)
    return (GELU_TANH if approximate else GELU_ERF)(x)


# silu(x) = x s(x), with s(x) = 1 / (1 + exp(-x)).


def _silu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, -2e3) * lax.logistic(x)


def _silu_backward(g: jax.Array, x: jax.Array) -> jax.Array:
    s, x = lax.logistic(x), jnp.clip(x, -1e3, 1e3)
    return g * (s * (1 + x * (1 - s)))


SILU = Pointwise(jax.nn.silu, _silu, _silu_backward)


def silu(x: ArrayLike) -> jax.Array:
    """The sigmoid linear unit, x / (1 + exp(-x)); `swish` is another name for it.

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.silu)(0.0)
        Array(0.5, dtype=float32, weak_type=True)

    Source: arXiv:1702.03118
    """
    return SILU(x)


swish = silu


# mish(x) = x tanh(log(1 + e)), with e = exp(x); that is x n / (n + 2) with n = e (e + 2).


def _mish(x: jax.Array) -> jax.Array:
    x = jnp.maximum(x, -1e3)
    e = jnp.exp(jnp.minimum(x, 25.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def _mish_backward(g: jax.Array, x: jax.Array) -> jax.Array:
    x = jnp.clip(x, -1e3, 25.0)
    e = jnp.exp(x)
    n = e * (e + 2)
    r = 1 / (n + 2)
    return g * (n * r + 4 * x * (e * r) * ((1 + e) * r))


MISH = Pointwise(jax.nn.mish, _mish, _mish_backward)


def mish(x: ArrayLike) -> jax.Array:
    """Mish, x tanh(softplus(x)), from one exponential.

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.grad(fcg.mish)(jnp.inf)
        Array(1., dtype=float32, weak_type=True)

    Source: arXiv:1908.08681
    """
    return MISH(x)


# softplus(x) = log(1 + exp(x)); log_sigmoid(x) = -softplus(-x).


def _softplus(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _softplus_backward(g: jax.Array, x: jax.Array) -> jax.Array:
    return g * lax.logistic(x)


def _log_sigmoid(x: jax.Array) -> jax.Array:
    return jnp.minimum(x, 0) - jnp.log1p(jnp.exp(-jnp.abs(x)))


def _log_sigmoid_backward(g: jax.Array, x: jax.Array) -> jax.Array:
    return g * lax.logistic(-x)


SOFTPLUS = Pointwise(jax.nn.softplus, _softplus, _softplus_backward)
LOG_SIGMOID = Pointwise(jax.nn.log_sigmoid, _log_sigmoid, _log_sigmoid_backward)


def softplus(x: ArrayLike) -> jax.Array:
    """Softplus, log(1 + exp(x)).

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.softplus)(0.0)
        Array(0.5, dtype=float32, weak_type=True)
    """
    return SOFTPLUS(x)


def log_sigmoid(x: ArrayLike) -> jax.Array:
    """The logarithm of the sigmoid, -log(1 + exp(-x)).

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.log_sigmoid)(0.0)
        Array(0.5, dtype=float32, weak_type=True)
    """
    return LOG_SIGMOID(x)


# squareplus(x) = (x + r) / 2, with r = sqrt(x^2 + b). For x < 0, where that cancels, it is
# b / (2 (r - x)). Its derivative is squareplus(x) / r, and 1 / (4 r) by b.


def _root(x: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(_is_far(x, b), jnp.abs(x), jnp.sqrt(x * x + b))


def _is_far(x: jax.Array, b: jax.Array) -> jax.Array:
    """Where b is lost in rounding; further out x^2 overflows, and at last |x| + r."""
    return jnp.abs(b) <= jnp.finfo(x.dtype).eps * (x * x)


def _squareplus(x: jax.Array, b: jax.Array) -> jax.Array:
    y = jnp.where(_is_far(x, b), jnp.abs(x), 0.5 * (jnp.abs(x) + jnp.sqrt(x * x + b)))
    return jnp.where(x < 0, 0.25 * b / y, y)


def _squareplus_backward(g: jax.Array, x: jax.Array, b: jax.Array) -> jax.Array:
    limits = jnp.finfo(x.dtype)
    x = jnp.clip(x, limits.min, limits.max)
    return g * (_squareplus(x, b) / jnp.maximum(_root(x, b), limits.tiny))


def _squareplus_backward_b(g: jax.Array, x: jax.Array, b: jax.Array) -> jax.Array:
    return g * (0.25 / _root(x, b))


SQUAREPLUS = Pointwise(
    jax.nn.squareplus,
    _squareplus,
    _squareplus_backward,
    parameter_backwards=(_squareplus_backward_b,),
)


def squareplus(x: ArrayLike, b: ArrayLike = 4) -> jax.Array:
    """Squareplus, (x + sqrt(x^2 + b)) / 2, accurate for negative x as well.

    Args:
        x: array of any shape.
        b: a number, or an array that broadcasts against x: how smooth the bend is.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.squareplus)(0.0)
        Array(0.5, dtype=float32)

    Source: arXiv:2112.11687
    """
    return SQUAREPLUS(x, b)


# soft_sign(x) = x / (1 + |x|).


def _soft_sign(x: jax.Array) -> jax.Array:
    largest = float(jnp.finfo(x.dtype).max)
    x = jnp.clip(x, -largest, largest)
    return x / (jnp.abs(x) + 1)


def _soft_sign_backward(g: jax.Array, x: jax.Array) -> jax.Array:
    r = 1 / (jnp.abs(x) + 1)
    return g * (r * r)


SOFT_SIGN = Pointwise(jax.nn.soft_sign, _soft_sign, _soft_sign_backward)


def soft_sign(x: ArrayLike) -> jax.Array:
    """Soft sign, `x / (1 + abs(x))`.

    Args:
        x: array of any shape.

    Returns:
        Array like x.

    Example:
        >>> import jax, flax_customgrad as fcg
        >>> jax.grad(fcg.soft_sign)(1.0)
        Array(0.25, dtype=float32, weak_type=True)
    """
    return SOFT_SIGN(x)
