"""The sign, with the surrogate gradients of binary networks.

    forward   y  = 1 where x >= 0, else -1
    backward  SteSign     dx = g where |x| <= clip_value, or g everywhere     arXiv:1602.02830
              ApproxSign  dx = g max(2 - 2 |x|, 0)                            arXiv:1808.00278
              SwishSign   dx = g beta (1 - t tanh(t)) / cosh(t)^2,            arXiv:1812.11800
                          t  = |beta x| / 2
    kept      SteSign a mask, one byte an element, or nothing; the others x

The bound is inclusive, and the sign of NaN is NaN. SwishSign has the derivative of
`2 s (1 + beta x (1 - s)) - 1` with `s = sigmoid(beta x)`. `cosh` overflows, so `1 / cosh(t)^2` is
computed from `exp(-2 t)`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.estimators.rounding.step import Step, keep_none, keep_within, straight_through
from flax_customgrad.numerics.argument_checks import check_clip_value, check_positive
from flax_customgrad.numerics.hyperbolic import sech_squared
from flax_customgrad.numerics.packing import masked


def sign(x: jax.Array, *parameters: Any) -> jax.Array:
    """1 where x >= 0 and -1 below, whatever parameters a backward has; NaN stays NaN."""
    return jnp.where(x >= 0, 1, jnp.where(x < 0, -1, x))


_SIGN = Step("SteSign", sign, masked, keep_within)
_SIGN_STRAIGHT_THROUGH = Step("SteSign", sign, straight_through, keep_none)


class SteSign(nnx.Module):
    """The sign, whose gradient passes where |x| <= clip_value.

    Args:
        clip_value: the bound, inclusive; None for a gradient that passes everywhere.

    Raises:
        ValueError: `clip_value` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> x = jnp.array([-2.0, -0.5, 0.0, 1.0])
        >>> fcg.SteSign()(x)
        Array([-1., -1.,  1.,  1.], dtype=float32)
        >>> jax.grad(lambda x: fcg.SteSign()(x).sum())(x)
        Array([0., 1., 1., 1.], dtype=float32)

    Source: arXiv:1602.02830
    """

    def __init__(self, clip_value: float | None = 1.0):
        self.clip_value = check_clip_value("SteSign", clip_value)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The sign of each element.

        Args:
            x: array of any shape.

        Returns:
            Array like x, of 1 and -1.
        """
        return _SIGN_STRAIGHT_THROUGH(x) if self.clip_value is None else _SIGN(x, self.clip_value)


def _approx_sign_backward(g: jax.Array, x: jax.Array) -> jax.Array:
    return g * jnp.maximum(2 - 2 * jnp.abs(x), 0)


_APPROX_SIGN = Step("ApproxSign", sign, _approx_sign_backward)


class ApproxSign(nnx.Module):
    """The sign, with the derivative of a parabola on each side of 0; Bi-Real Net.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.grad(lambda x: fcg.ApproxSign()(x).sum())(jnp.array([-0.75, 0.0, 2.0]))
        Array([0.5, 2. , 0. ], dtype=float32)

    Source: arXiv:1808.00278
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """The sign of each element.

        Args:
            x: array of any shape.

        Returns:
            Array like x, of 1 and -1.
        """
        return _APPROX_SIGN(x)


def _swish_sign_backward(g: jax.Array, x: jax.Array, beta: jax.Array) -> jax.Array:
    # Beyond 400 every factor is 0 in every dtype, and at infinity 0 times infinity would be NaN.
    t = jnp.minimum(jnp.abs(beta * x) / 2, 400)
    return g * beta * (1 - t * jnp.tanh(t)) * sech_squared(t)


_SWISH_SIGN = Step("SwishSign", sign, _swish_sign_backward)


class SwishSign(nnx.Module):
    """The sign, with the derivative of a smooth function that overshoots it.

    Args:
        beta: how steep that function is; a positive number, or a traced one.

    Raises:
        ValueError: beta is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.grad(lambda x: fcg.SwishSign()(x).sum())(jnp.array([0.0, 0.5, 1000.0]))
        Array([ 5.        , -0.0846..., -0.        ], dtype=float32)

    Source: arXiv:1812.11800
    """

    def __init__(self, beta: float = 5.0):
        self.beta = check_positive("SwishSign", "beta", beta)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The sign of each element.

        Args:
            x: array of any shape.

        Returns:
            Array like x, of 1 and -1.
        """
        return _SWISH_SIGN(x, self.beta)
