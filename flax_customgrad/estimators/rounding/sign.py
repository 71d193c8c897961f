"""The sign, with the gradients that binary networks train by.

    forward   y  = 1 where x >= 0, else -1
    backward  SteSign     dx = g where |x| <= c, or g everywhere              arXiv:1602.02830
              ApproxSign  dx = g max(0, 2 - 2 |x|)                            arXiv:1808.00278
              SwishSign   dx = g b (1 - t tanh(t)) / cosh(t)^2,  t = b x / 2  arXiv:1812.11800
    kept      SteSign a mask, one byte an element, or nothing; the others x

The bound c is inclusive, and the sign of NaN is NaN. What SwishSign differentiates is
2 s (1 + b x (1 - s)) - 1 with s = sigmoid(b x). cosh overflows, so that the derivative is computed
from exp(-2 |t|).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.estimators.rounding.step import Step, keep_none, straight_through, where_kept
from flax_customgrad.numerics.argument_checks import check_clip_value, check_positive
from flax_customgrad.numerics.hyperbolic import sech_squared


def sign(x: jax.Array) -> jax.Array:
    """1 where x >= 0 and -1 below; NaN stays NaN."""
    return jnp.where(x >= 0, 1, jnp.where(x < 0, -1, x))


def sign_of(x: jax.Array, *parameters: Any) -> jax.Array:
    """The sign, whatever parameters the backward of a step has."""
    return sign(x)


def within(x: jax.Array, bound: jax.typing.ArrayLike) -> tuple[jax.Array]:
    """Keeps where |x| <= bound."""
    return (jnp.abs(x) <= bound,)


_SIGN = Step("SteSign", sign_of, where_kept, within)
_SIGN_PASSING = Step("SteSign", sign_of, straight_through, keep_none)


class SteSign(nnx.Module):
    """The sign, whose gradient passes where |x| <= clip_value; arXiv:1602.02830.

    Args:
        clip_value: the bound, inclusive; None for a gradient that passes everywhere.

    Raises:
        ValueError: the bound is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> x = jnp.array([-2.0, -0.5, 0.0, 1.0])
        >>> fcg.SteSign()(x)
        Array([-1., -1.,  1.,  1.], dtype=float32)
        >>> jax.grad(lambda x: fcg.SteSign()(x).sum())(x)
        Array([0., 1., 1., 1.], dtype=float32)
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
        return _SIGN_PASSING(x) if self.clip_value is None else _SIGN(x, self.clip_value)


def _triangle(g: jax.Array, x: jax.Array) -> jax.Array:
    return g * jnp.maximum(2 - 2 * jnp.abs(x), 0)


_APPROX_SIGN = Step("ApproxSign", sign_of, _triangle)


class ApproxSign(nnx.Module):
    """The sign, with the derivative of a parabola on each side of 0; Bi-Real Net, arXiv:1808.00278.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.grad(lambda x: fcg.ApproxSign()(x).sum())(jnp.array([-0.75, 0.0, 2.0]))
        Array([0.5, 2. , 0. ], dtype=float32)
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """The sign of each element.

        Args:
            x: array of any shape.

        Returns:
            Array like x, of 1 and -1.
        """
        return _APPROX_SIGN(x)


def _bell(g: jax.Array, x: jax.Array, beta: jax.Array) -> jax.Array:
    # Beyond 400 every factor is 0 in every dtype, and at infinity 0 times infinity would be NaN.
    t = jnp.minimum(jnp.abs(beta * x) / 2, 400)
    return g * beta * (1 - t * jnp.tanh(t)) * sech_squared(t)


_SWISH_SIGN = Step("SwishSign", sign_of, _bell)


class SwishSign(nnx.Module):
    """The sign, with the derivative of a smooth function that overshoots it; arXiv:1812.11800.

    Args:
        beta: how steep that function is; a positive number, or a traced one.

    Raises:
        ValueError: beta is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> jax.grad(lambda x: fcg.SwishSign()(x).sum())(jnp.array([0.0, 0.5, 1000.0]))
        Array([ 5.        , -0.0846..., -0.        ], dtype=float32)
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
