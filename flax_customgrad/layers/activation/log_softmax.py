"""log_softmax along any axes, with limits in rows that are infinite or masked throughout.

    forward   y  = x - m - log(s),  m = max x,  s = sum exp(x - m)     over each row
    backward  dx = w (g - exp(y) sum g),  w = 0 in a row without weight, else 1
    kept      y, and of each row w

In a row with weight, where (i = j) is 1 if it holds, else 0:

    ∂y_j/∂x_i = (i = j) - exp(x_i - m) / s = (i = j) - exp(y_i)
    dx_i      = sum_j g_j ∂y_j/∂x_i = g_i - exp(y_i) sum_j g_j

The backward computes exp(y) again, of a y that what follows often keeps as well. Autodiff keeps
exp(x - m) of the forward, an array of its own.

What happens in a row with an infinite m is said in `softmax_rows`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
from flax_customgrad.numerics.accumulation import fusion_barrier
from flax_customgrad.numerics.dtypes import as_array, in_dtype, takes_custom_backward, widened
from flax_customgrad.numerics.faster_on_one_cpu import faster_on_one_cpu, has_no_number
from flax_customgrad.numerics.inline_jit import inline_jit
from flax_customgrad.numerics.platform import pays_to_branch


class Residuals(NamedTuple):
    """What the backward of `log_softmax_of_rows` keeps."""

    y: jax.Array
    w: jax.Array
    axis: ReductionAxes


@custom_vjp
def log_softmax_of_rows(x: jax.Array, axis: ReductionAxes) -> jax.Array:
    """The logarithm of the softmax of each row.

    Args:
        x: array of any shape, float.
        axis: the axes of a row.

    Returns:
        Array like x.
    """
    return _log_softmax(axis, x)[0]


def _fwd(x: jax.Array, axis: ReductionAxes) -> tuple[jax.Array, Residuals]:
    y, w = _log_softmax(axis, x)
    return y, Residuals(y, w, axis)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None]:
    chex.assert_equal_shape([g, res.y])
    chex.assert_is_broadcastable(res.w.shape, g.shape)
    dx = _cotangent(res.axis, res.y, res.w, g)
    chex.assert_equal_shape([dx, res.y])
    return dx, None


log_softmax_of_rows.defvjp(_fwd, _bwd)


def _log_softmax_on_one_cpu(axis: ReductionAxes, x: jax.Array) -> tuple[jax.Array, Any]:
    (wide,) = widened(x.dtype, x)
    shifted = wide - row_max(wide, axis)
    s = jnp.sum(jnp.exp(shifted), axis, keepdims=True)
    # Barrier: as in `softmax`.
    y = lax.optimization_barrier(in_dtype(shifted - jnp.log(s), x.dtype))
    return has_no_number(y, axis), (y, jnp.ones_like(s))


def _pays(x: jax.Array) -> bool:
    """Float32 of fewer than 2^20 elements takes as long by the formulas above."""
    return pays_to_branch(x.size if x.dtype.itemsize < 4 else x.size // 16)


@inline_jit(static_argnums=0)
@faster_on_one_cpu(_log_softmax_on_one_cpu, _pays)
def _log_softmax(axis: ReductionAxes, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    (wide,) = widened(x.dtype, x)
    m = row_max(wide, axis)
    shifted = minus_max(wide, m)
    s = jnp.sum(jnp.exp(shifted), axis, keepdims=True)
    w = jnp.minimum(s, 1)
    return in_dtype(shifted - jnp.log(nonzero(s)), x.dtype), w


@inline_jit(static_argnums=0)
def _cotangent(axis: ReductionAxes, y: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
    y, g = widened(g.dtype, y, g)
    # Barrier: XLA's library for sums would compute the exponential too, and take 1.3 times as long.
    sum_g = fusion_barrier(jnp.sum(g, axis, keepdims=True))
    return w * (g - jnp.exp(y) * sum_g)


_of_jax = jax.nn.log_softmax
"""The function of JAX, whose name in `jax.nn` a user may give to ours."""


def log_softmax(
    x: ArrayLike, axis: int | Sequence[int] | None = -1, where: ArrayLike | None = None
) -> jax.Array:
    """The logarithm of `softmax`.

    Args:
        x: array of any shape.
        axis: the axis or axes, None for all.
        where: a mask that broadcasts against x: which elements count. The others get minus
            infinity.

    Returns:
        Array like x; minus infinity in a row that holds nothing else or is masked throughout.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.log_softmax(jnp.array([-jnp.inf, 0.0]))
        Array([-inf,   0.], dtype=float32)
    """
    x, axis = as_array(x), reduction_axes(axis)
    if not takes_custom_backward(x):
        return _of_jax(x, axis, where)
    return only_where(log_softmax_of_rows(only_where(x, where), axis), where)
