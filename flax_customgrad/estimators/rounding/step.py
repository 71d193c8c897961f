"""Step: a function of each element of x with a gradient put in the place of its own.

    forward   y  = f(x, p...)
    backward  dx = what the step says, a function of g and of what is kept
    kept      x and the parameters, unless a step says otherwise: a mask, or nothing

A step is flat wherever it has a derivative, so the true gradient is zero and nothing below it
learns (arXiv:1308.3432). The forward is the step itself, to the bit; the usual
`x + stop_gradient(f(x) - x)` is rounded twice, and makes the sign of 1e8 zero. Parameters (a slope,
a bound, noise) have no gradient. In half precision the backward is computed in float32 and rounded
once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.numerics.broadcasting import broadcasts
from flax_customgrad.numerics.dtypes import as_array, in_dtype, is_supported_float, widened


def keep_all(x: jax.Array, *parameters: Any) -> tuple[Any, ...]:
    """Keeps x and the parameters."""
    return x, *parameters


def keep_none(x: jax.Array, *parameters: Any) -> tuple[Any, ...]:
    """Keeps nothing."""
    return ()


def identity(g: jax.Array) -> jax.Array:
    """The gradient as it came: the straight-through estimator."""
    return g


def masked(g: jax.Array, mask: jax.Array) -> jax.Array:
    """The gradient where a mask is true, and 0 elsewhere."""
    return jnp.where(mask, g, 0)


@dataclass(frozen=True)
class Step:
    """A step with the gradient that it pretends to have; called as `f(x, *parameters)`.

    Attributes:
        name: how errors call it.
        forward: y as a function of (x, *parameters).
        backward: dx as a function of (g, *kept); it sees no half precision.
        keep: what is kept, as a function of (x, *parameters).
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
        return step(x, parameters, self)


class Residuals(NamedTuple):
    """What the backward of `step` keeps."""

    kept: tuple[Any, ...]
    of: Step


@custom_vjp(surrogate=True)
def step(x: jax.Array, parameters: tuple[Any, ...], f: Step) -> jax.Array:
    """Applies a step.

    Args:
        x: array of any shape, float.
        parameters: numbers, or arrays that broadcast to the shape of x; without a gradient.
        f: the step.

    Returns:
        Array like x.
    """
    return in_dtype(f.forward(x, *parameters), x.dtype)


def _fwd(x: jax.Array, parameters: tuple[Any, ...], f: Step) -> tuple[jax.Array, Residuals]:
    return step(x, parameters, f), Residuals(f.keep(x, *parameters), f)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None, None]:
    arrays = [jnp.asarray(kept) for kept in res.kept]
    return res.of.backward(*widened(g.dtype, g, *arrays)), None, None


step.defvjp(_fwd, _bwd)
