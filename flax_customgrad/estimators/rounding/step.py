"""`Step`: an elementwise function with a surrogate gradient, as its own gradient is zero.

    forward   y  = f(x, p...)
    backward  dx = backward(g, kept...), a function of each step
    kept      x and the parameters, unless the step has another `keep`: a mask, or nothing

A step is flat wherever it has a derivative, so the true gradient is zero and nothing below it
learns (arXiv:1308.3432). The forward is the step itself, to the bit, in the dtype of x; the usual
`x + stop_gradient(f(x) - x)` is rounded twice, and makes the sign of 1e8 zero. Parameters (a slope,
a bound, noise) have no gradient. In half precision the backward is computed in float32 and rounded
once (`elementwise_surrogate`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.numerics.broadcasting import broadcasts
from flax_customgrad.numerics.dtypes import as_array, in_dtype, is_supported_float
from flax_customgrad.numerics.elementwise import Elementwise, elementwise_surrogate


def keep_all(x: jax.Array, *parameters: Any) -> tuple[Any, ...]:
    """Keeps x and the parameters."""
    return x, *parameters


def keep_none(x: jax.Array, *parameters: Any) -> tuple[Any, ...]:
    """Keeps nothing."""
    return ()


def keep_within(x: jax.Array, clip_value: Any) -> tuple[jax.Array]:
    """Keeps a mask: where |x| <= clip_value."""
    return (jnp.abs(x) <= clip_value,)


def straight_through(g: jax.Array) -> jax.Array:
    """Returns the cotangent unchanged: the straight-through estimator."""
    return g


@dataclass(frozen=True)
class Step(Elementwise):
    """A step with its surrogate gradient; called as `f(x, *parameters)`.

    Attributes:
        name: its name in errors.
        forward: y as a function of (x, *parameters).
        backward: dx as a function of (g, *kept), which are float32 or wider.
        keep: the residuals, as a function of (x, *parameters).
    """

    name: str
    forward: Callable[..., jax.Array]
    backward: Callable[..., jax.Array]
    keep: Callable[..., tuple[Any, ...]] = keep_all

    def __call__(self, x: Any, *parameters: Any) -> jax.Array:
        """Applies the step.

        Args:
            x: array of any shape; integers have no gradient.
            *parameters: numbers, or arrays that broadcast to the shape of x.

        Returns:
            Array like x.

        Raises:
            TypeError: x is complex or an 8-bit float.
            ValueError: a parameter does not broadcast to the shape of x.
        """
        x = jnp.asarray(as_array(x))
        for parameter in parameters:
            if not broadcasts(jnp.shape(parameter), x.shape):
                raise ValueError(
                    f"{self.name}: a parameter of shape {jnp.shape(parameter)} does not broadcast "
                    f"to x, which has shape {x.shape}"
                )
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return self.forward(x, *parameters).astype(x.dtype)
        if not is_supported_float(x):
            raise TypeError(
                f"{self.name} takes float16, bfloat16, float32 and float64, got {x.dtype}: cast it "
                "with x.astype(...) first"
            )
        return elementwise_surrogate(x, parameters, self)

    def primal(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The forward, in the dtype of x."""
        return in_dtype(self.forward(x, *parameters), x.dtype)

    def residuals(self, x: jax.Array, y: jax.Array, *parameters: Any) -> tuple[Any, ...]:
        """What `keep` returns."""
        return self.keep(x, *parameters)

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[jax.Array]:
        """The cotangent of x."""
        return (self.backward(g, *kept),)
