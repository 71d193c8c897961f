"""logsumexp along any axes, with limits in rows that are infinite or masked throughout.

    forward   y  = m + log(s),  m = max x,  s = sum exp(x - m)     over each row
    backward  dx = g exp(x - m) / s
    kept      x, and of each row m and s

The maximum cancels: y = log(sum exp(x)), whose derivative is the softmax of the row,

    ∂y/∂x_i = exp(x_i) / sum exp(x) = exp(x_i - m) / s

What happens in a row with an infinite m is said in `softmax_rows`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.activation.softmax_rows import (
    ReductionAxes,
    exponent,
    nonzero,
    only_where,
    reduction_axes,
    row_max,
)
from flax_customgrad.numerics.dtypes import as_array, in_dtype, takes_custom_backward, widened
from flax_customgrad.numerics.inline_jit import inline_jit


class Residuals(NamedTuple):
    """What the backward of `logsumexp_of_rows` keeps."""

    x: jax.Array
    m: jax.Array
    s: jax.Array


@custom_vjp
def logsumexp_of_rows(x: jax.Array, axis: ReductionAxes) -> jax.Array:
    """The logarithm of the sum of the exponentials of each row.

    Args:
        x: array of any shape, float.
        axis: the axes of a row.

    Returns:
        Array of x's shape, the axes of a row of size 1.
    """
    return _logsumexp(axis, x)[0]


def _fwd(x: jax.Array, axis: ReductionAxes) -> tuple[jax.Array, Residuals]:
    y, m, s = _logsumexp(axis, x)
    return y, Residuals(x, m, s)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None]:
    chex.assert_equal_shape([g, res.m, res.s])
    dx = _cotangent(*res, g)
    chex.assert_equal_shape([dx, res.x])
    return dx, None


logsumexp_of_rows.defvjp(_fwd, _bwd)


@inline_jit(static_argnums=0)
def _logsumexp(axis: ReductionAxes, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # The maximum is that of x before it is widened: XLA would store a wide x for both.
    wide, m = widened(x.dtype, x, row_max(x, axis))
    s = jnp.sum(jnp.exp(exponent(wide, m)), axis, keepdims=True)
    return in_dtype(m + jnp.log(s + 0 * s), x.dtype), m, s  # of no number s is infinite


@inline_jit(static_argnums=())
def _cotangent(x: jax.Array, m: jax.Array, s: jax.Array, g: jax.Array) -> jax.Array:
    x, g = widened(g.dtype, x, g)
    return jnp.exp(exponent(x, m)) * (g / nonzero(s))


_of_jax = jax.nn.logsumexp
"""The function of JAX, whose name in `jax.nn` a user may give to ours."""


def logsumexp(
    a: ArrayLike,
    axis: int | Sequence[int] | None = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
) -> Any:
    """The logarithm of a sum of exponentials.

    With factors `b`, with `return_sign`, and for complex numbers it is `jax.nn.logsumexp`, which
    JAX differentiates.

    Args:
        a: array of any shape.
        axis: the axis or axes of the sum, None for all.
        b: factors of the exponentials, or None.
        keepdims: whether the axes of the sum stay, with size 1.
        return_sign: whether to return the sign of the sum beside the logarithm of its size.
        where: a mask that broadcasts against a: which elements count.

    Returns:
        Array of a's shape without the axes of the sum; minus infinity where nothing is summed. With
        `return_sign` a pair of arrays.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.logsumexp(jnp.array([-jnp.inf, 0.0]))
        Array(0., dtype=float32)
    """
    a, axis = as_array(a), reduction_axes(axis)
    if b is not None or return_sign or not takes_custom_backward(a):
        return _of_jax(a, axis, b, keepdims, return_sign, where)
    y = logsumexp_of_rows(only_where(a, where), axis)
    return y if keepdims else jnp.squeeze(y, axis)
