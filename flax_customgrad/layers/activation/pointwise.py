"""Pointwise: a function of each element of x, and what its backward keeps of them.

    forward   y  = f(x, p...)
    backward  dx = g f'(x, p...), written as a function of g and of what is kept
              dp = sum g df/dp, over the axes along which the parameter p was repeated
    kept      x unless a function says otherwise, and the parameters as they came

Autodiff keeps one array for every product in f, 2 to 5 the size of x for the smooth functions.
Half precision is computed in float32, forward and backward, and rounded once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.numerics.broadcasting import sum_to_shape
from flax_customgrad.numerics.dtypes import (
    as_array,
    in_dtype,
    is_python_number,
    takes_custom_backward,
    widened,
)

Formula = Callable[..., jax.Array]
"""A function of arrays that broadcast; it sees no half precision."""


def the_input(x: jax.Array, y: jax.Array) -> jax.Array:
    """Keeps x."""
    return x


def the_output(x: jax.Array, y: jax.Array) -> jax.Array:
    """Keeps y, for a function whose derivative it gives as well."""
    return y


@dataclass(frozen=True)
class Pointwise:
    """A pointwise function with its backward; called as `f(x, *parameters)`.

    Attributes:
        reference: the function of JAX that computes what this one does not take.
        forward: y as a function of (x, *parameters).
        backward: dx as a function of (g, kept, *parameters).
        keep: what is kept, as a function of (x, y): `the_input`, `the_output`, or a mask.
        of_parameters: for each parameter that may be trained its gradient before the sum, as a
            function of (g, x, *parameters); `keep` is then `the_input`.
    """

    reference: Callable[..., Any]
    forward: Formula
    backward: Formula
    keep: Formula = the_input
    of_parameters: tuple[Formula, ...] = ()

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
        return pointwise(x, parameters, self)


class Residuals(NamedTuple):
    """What the backward of `pointwise` keeps."""

    kept: jax.Array
    parameters: tuple[Any, ...]
    shape: tuple[int, ...]
    f: Pointwise


@custom_vjp
def pointwise(x: jax.Array, parameters: tuple[Any, ...], f: Pointwise) -> jax.Array:
    """Applies a pointwise function.

    Args:
        x: array of any shape, float.
        parameters: numbers, or arrays that broadcast against x.
        f: the function.

    Returns:
        Array of the shape to which x and the parameters broadcast, in the dtype to which they
        promote.
    """
    return _evaluate(f, x, parameters)


def _fwd(x: jax.Array, parameters: tuple[Any, ...], f: Pointwise) -> tuple[jax.Array, Residuals]:
    y = pointwise(x, parameters, f)
    return y, Residuals(f.keep(x, y), parameters, x.shape, f)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, tuple[Any, ...], None]:
    f, parameters = res.f, res.parameters
    dx = sum_to_shape(_differentiate(f.backward, g, res.kept, parameters), res.shape)
    if not any(map(_is_trained, parameters)):
        return dx, (None,) * len(parameters), None
    dparameters = tuple(
        sum_to_shape(_differentiate(backward, g, res.kept, parameters), p.shape)
        if _is_trained(p)
        else None
        for p, backward in zip(parameters, f.of_parameters, strict=True)
    )
    return dx, dparameters, None


pointwise.defvjp(_fwd, _bwd)


# One call and no arrays in between, also outside of any jit; the first argument is static.
once = functools.partial(jax.jit, static_argnums=0, inline=True)


@once
def _evaluate(f: Pointwise, x: jax.Array, parameters: tuple[Any, ...]) -> jax.Array:
    dtype = jnp.result_type(x, *parameters)
    return in_dtype(f.forward(*widened(dtype, x, *parameters)), dtype)


@once
def _differentiate(
    backward: Formula, g: jax.Array, kept: jax.Array, parameters: tuple[Any, ...]
) -> jax.Array:
    return backward(*widened(g.dtype, g, kept, *parameters))


def _is_real(p: Any) -> bool:
    return isinstance(p, int | float) or (isinstance(p, jax.Array) and not jnp.iscomplexobj(p))


def _is_trained(p: Any) -> bool:
    return isinstance(p, jax.Array) and jnp.issubdtype(p.dtype, jnp.floating)
