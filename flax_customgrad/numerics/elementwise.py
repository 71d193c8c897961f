"""Elementwise functions with a hand-written backward: the operations that all of them share.

    forward   y  = f(x, p...)                   x and the parameters p broadcast against each other
    backward  dx = f.cotangents(g, kept...)     summed to the shape of x
              dp = likewise for each parameter that has a gradient, summed to its shape
    kept      f.residuals(x, y, p...)

There are two operations over these rules. `elementwise` is exact: its backward is the derivative of
its forward, and inside `use_autodiff` JAX differentiates the forward itself. The backward of
`elementwise_surrogate` is meant to differ from the derivative, as a straight-through estimator
does: it is used everywhere, also inside `use_autodiff` and where y is differentiated twice.

A backward is computed in float32, or in float64 for float64, and rounded once, to the dtype of what
it is the gradient of. Outside of a jit each pass is one compiled call.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from flax_customgrad.contract.custom_vjp import CustomVJP, custom_vjp
from flax_customgrad.numerics.broadcasting import sum_to_shape
from flax_customgrad.numerics.dtypes import in_dtype, widened
from flax_customgrad.numerics.inline_jit import inline_jit


class Elementwise(ABC):
    """An elementwise function with its backward; a subclass is a frozen dataclass.

    Attributes:
        selects: whether the backward selects numbers and rounds none; half precision stays so.
    """

    selects: bool = False

    @abstractmethod
    def primal(self, x: jax.Array, /, *parameters: Any) -> Any:
        """The function: y, or y and its integer codes.

        Args:
            x: array of any shape, float.
            *parameters: arrays that broadcast against x.
        """

    @abstractmethod
    def residuals(self, x: jax.Array, y: Any, /, *parameters: Any) -> tuple[Any, ...]:
        """What the backward needs.

        Args:
            x: array of any shape, float.
            y: what `primal` returned.
            *parameters: numbers, or arrays that broadcast against x.

        Returns:
            Arrays and numbers.
        """

    @abstractmethod
    def cotangents(self, g: jax.Array, /, *kept: Any) -> tuple[Any, ...]:
        """The backward.

        Args:
            g: the cotangent of y; float32 or wider.
            *kept: what `residuals` returned, floating arrays in float32 or wider.

        Returns:
            The cotangents of x and of the parameters, None for one without; or that of x alone.
            They may have the shape of g: each is summed to the shape of its argument afterwards.
        """


def in_float32(f: Callable[..., jax.Array], dtype: Any, *arrays: jax.Array) -> jax.Array:
    """Computes a function in float32 where the result has half precision, and rounds once.

    Args:
        f: the function.
        dtype: dtype of the result.
        *arrays: its arguments, arrays of any shape.

    Returns:
        What the function returns, in that dtype.
    """
    return in_dtype(f(*widened(dtype, *arrays)), dtype)


class Residuals(NamedTuple):
    """What the backward of an elementwise function keeps.

    Attributes:
        kept: what `f.residuals` returned.
        shapes: those of x and of each parameter with a gradient; None for a number or integers.
        f: the function.
    """

    kept: tuple[Any, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    f: Elementwise


@custom_vjp
def elementwise(x: jax.Array, parameters: tuple[Any, ...], f: Elementwise) -> Any:
    """Applies a function whose backward is its derivative.

    Args:
        x: array of any shape, float.
        parameters: numbers, or arrays that broadcast against x.
        f: the function.

    Returns:
        What `f.primal` returns.
    """
    return _primal(f, x, parameters)


@custom_vjp(surrogate=True)
def elementwise_surrogate(x: jax.Array, parameters: tuple[Any, ...], f: Elementwise) -> Any:
    """Applies a function whose backward is a surrogate of its derivative.

    Args:
        x: array of any shape, float.
        parameters: numbers, or arrays that broadcast against x.
        f: the function.

    Returns:
        What `f.primal` returns.
    """
    return _primal(f, x, parameters)


@inline_jit(static_argnums=0)
def _primal(f: Elementwise, x: jax.Array, parameters: tuple[Any, ...]) -> Any:
    return f.primal(x, *parameters)


def _fwd_of(operation: CustomVJP) -> Callable[..., tuple[Any, Residuals]]:
    """The forward rule of an operation, which calls it: y keeps the derivative of a surrogate."""

    def fwd(x: jax.Array, parameters: tuple[Any, ...], f: Elementwise) -> tuple[Any, Residuals]:
        y = operation(x, parameters, f)
        shapes = (jnp.shape(x), *(p.shape if has_gradient(p) else None for p in parameters))
        return y, Residuals(f.residuals(x, y, *parameters), shapes, f)

    return fwd


def _bwd(res: Residuals, g: Any) -> tuple[jax.Array, tuple[Any, ...] | None, None]:
    g = g[0] if isinstance(g, tuple) else g  # Codes have no cotangent.
    chex.assert_is_broadcastable(res.shapes[0], g.shape)
    dx, *dparameters = _cotangents(res.f, res.shapes, g, res.kept)
    for d, shape in zip((dx, *dparameters), res.shapes, strict=False):
        if d is not None:
            chex.assert_shape(d, shape)
            chex.assert_type(d, float)
    return dx, tuple(dparameters) or None, None


@inline_jit(static_argnums=(0, 1))
def _cotangents(
    f: Elementwise, shapes: tuple[tuple[int, ...] | None, ...], g: jax.Array, kept: tuple[Any, ...]
) -> tuple[Any, ...]:
    arguments = (g, *kept) if f.selects else widened(g.dtype, g, *kept)
    cotangents = f.cotangents(*arguments)
    if len(cotangents) > 1:
        chex.assert_equal(len(cotangents), len(shapes))
    return tuple(
        None if d is None or shape is None else sum_to_shape(d, shape)
        for d, shape in zip(cotangents, shapes, strict=False)
    )


elementwise.defvjp(_fwd_of(elementwise), _bwd)
elementwise_surrogate.defvjp(_fwd_of(elementwise_surrogate), _bwd)


def has_gradient(parameter: Any) -> bool:
    """Whether a parameter is a floating array; a Python number has no gradient."""
    return isinstance(parameter, jax.Array) and jnp.issubdtype(parameter.dtype, jnp.floating)
