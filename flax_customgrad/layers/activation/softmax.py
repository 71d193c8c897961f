"""softmax along any axes, with limits in rows that are infinite or masked throughout.

    forward   y  = exp(x - m) / s,  m = max x,  s = sum exp(x - m)     over each row
    backward  dx = y (g - sum g y)
    kept      y

By the quotient rule; m cancels in y, and (i = j) is 1 where it holds, else 0:

    ∂y_j/∂x_i = y_j ((i = j) - y_i)
    dx_i      = sum_j g_j ∂y_j/∂x_i = y_i (g_i - sum_j g_j y_j)

What happens in a row with an infinite m is said in `softmax_rows`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.activation.softmax_rows import (
    ReductionAxes,
    minus_max,
    nonzero,
    only_where,
    reduction_axes,
    row_max,
)
from flax_customgrad.numerics.dtypes import as_array, in_dtype, takes_custom_backward, widened
from flax_customgrad.numerics.faster_on_one_cpu import faster_on_one_cpu, has_no_number
from flax_customgrad.numerics.inline_jit import inline_jit


class Residuals(NamedTuple):
    """What the backward of `softmax_of_rows` keeps."""

    y: jax.Array
    axis: ReductionAxes


@custom_vjp
def softmax_of_rows(x: jax.Array, axis: ReductionAxes) -> jax.Array:
    """The softmax of each row.

    Args:
        x: array of any shape, float.
        axis: the axes of a row.

    Returns:
        Array like x.
    """
    return _softmax(axis, x)


def _fwd(x: jax.Array, axis: ReductionAxes) -> tuple[jax.Array, Residuals]:
    y = softmax_of_rows(x, axis)
    return y, Residuals(y, axis)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None]:
    chex.assert_equal_shape([g, res.y])
    dx = _cotangent(res.axis, res.y, g)
    chex.assert_equal_shape([dx, res.y])
    return dx, None


softmax_of_rows.defvjp(_fwd, _bwd)


def _softmax_on_one_cpu(axis: ReductionAxes, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    (wide,) = widened(x.dtype, x)
    e = jnp.exp(wide - row_max(wide, axis))
    # Barrier: XLA would look at elements of e / s that it computes anew, and store e for that.
    y = lax.optimization_barrier(in_dtype(e / jnp.sum(e, axis, keepdims=True), x.dtype))
    return has_no_number(y, axis), y


@inline_jit(static_argnums=0)
@faster_on_one_cpu(_softmax_on_one_cpu)
def _softmax(axis: ReductionAxes, x: jax.Array) -> jax.Array:
    (wide,) = widened(x.dtype, x)
    m = row_max(wide, axis)
    e = jnp.exp(minus_max(wide, m))
    s = jnp.sum(e, axis, keepdims=True)
    return in_dtype(e * (1 / nonzero(s)), x.dtype)


@inline_jit(static_argnums=0)
def _cotangent(axis: ReductionAxes, y: jax.Array, g: jax.Array) -> jax.Array:
    y, g = widened(g.dtype, y, g)
    return y * (g - jnp.sum(g * y, axis, keepdims=True))


_of_jax = jax.nn.softmax
"""The function of JAX, whose name in `jax.nn` a user may give to ours."""


def softmax(
    x: ArrayLike, axis: int | Sequence[int] | None = -1, where: ArrayLike | None = None
) -> jax.Array:
    """Exponentials that add up to 1 along an axis.

    Args:
        x: array of any shape.
        axis: the axis or axes, None for all.
        where: a mask that broadcasts against x: which elements count. The others get 0.

    Returns:
        Array like x; 0 in a row that holds minus infinity alone or is masked throughout.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.softmax(jnp.array([0.0, jnp.inf]))
        Array([0., 1.], dtype=float32)
    """
    x, axis = as_array(x), reduction_axes(axis)
    if not takes_custom_backward(x):
        return _of_jax(x, axis, where)
    return softmax_of_rows(only_where(x, where), axis)
