"""Pointwise: an exact function of each element of x, and what its backward keeps.

    forward   y  = f(x, p...)
    backward  dx = g f'(x, p...), written as a function of g and of what is kept
              dp = sum of g df/dp, over the axes along which the parameter p was repeated
    kept      x unless a function says otherwise, and the parameters as they came

Autodiff keeps one array for every product in f, 2 to 5 the size of x for the smooth functions.
Half precision is computed in float32, forward and backward, and rounded once (`elementwise`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp

from flax_customgrad.numerics.dtypes import as_array, is_python_number, takes_custom_backward
from flax_customgrad.numerics.elementwise import (
    Elementwise,
    elementwise,
    has_gradient,
    in_float32,
)

Formula = Callable[..., jax.Array]
"""A function of arrays that broadcast; it sees no half precision."""


def keep_input(x: jax.Array, y: jax.Array) -> jax.Array:
    """Keeps x."""
    return x


def keep_output(x: jax.Array, y: jax.Array) -> jax.Array:
    """Keeps y, for a function whose derivative is a function of y."""
    return y


@dataclass(frozen=True)
class Pointwise(Elementwise):
    """A pointwise function with its backward; called as `f(x, *parameters)`.

    Attributes:
        reference: the function of JAX that computes what this one does not take.
        forward: y as a function of (x, *parameters).
        backward: dx as a function of (g, kept, *parameters).
        keep: what is kept, as a function of (x, y): `keep_input`, `keep_output`, or a mask.
        parameter_backwards: for each parameter that may be trained its cotangent before the sum,
            as a function of (g, x, *parameters); `keep` is then `keep_input`.
        selects: whether both passes select numbers and round none; half precision stays so.
    """

    reference: Callable[..., Any]
    forward: Formula
    backward: Formula
    keep: Formula = keep_input
    parameter_backwards: tuple[Formula, ...] = ()
    selects: bool = False

    def __call__(self, x: Any, *parameters: Any) -> jax.Array:
        """Applies the function.

        Args:
            x: array of any shape.
            *parameters: numbers, or arrays that broadcast against x.

        Returns:
            Array of the shape to which x and the parameters broadcast, in the dtype to which they
            promote.
        """
        x = jnp.asarray(x) if isinstance(x, float) else as_array(x)
        # A Python number stays one: it is weakly typed and has no gradient.
        parameters = tuple(p if is_python_number(p) else as_array(p) for p in parameters)
        if not takes_custom_backward(x) or not all(map(_is_real, parameters)):
            return self.reference(x, *parameters)
        return elementwise(x, parameters, self)

    def primal(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The forward, in the dtype to which x and the parameters promote."""
        if self.selects:
            return self.forward(x, *parameters)
        return in_float32(self.forward, jnp.result_type(x, *parameters), x, *parameters)

    def residuals(self, x: jax.Array, y: jax.Array, *parameters: Any) -> tuple[Any, ...]:
        """What `keep` says, and the parameters."""
        if any(map(has_gradient, parameters)):
            chex.assert_equal(len(self.parameter_backwards), len(parameters))
        return self.keep(x, y), *parameters

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[jax.Array, ...]:
        """Those of x and, where it may be trained, of each parameter."""
        return tuple(backward(g, *kept) for backward in (self.backward, *self.parameter_backwards))


def _is_real(p: Any) -> bool:
    return isinstance(p, int | float) or (isinstance(p, jax.Array) and not jnp.iscomplexobj(p))
