"""softmax, log_softmax and logsumexp along any axes, defined for infinite inputs too.

    m = max x,  s = sum exp(x - m)

    softmax      y = exp(x - m) / s             dx = y (g - sum g y)
    log_softmax  y = x - m - log(s)             dx = g - exp(y) sum g
    logsumexp    y = m + log(s)                 dx = g exp(x - m) / s
    kept         y, for logsumexp x, and of each row m and s

Where m is infinite, x - m is not a number, and the limit is taken instead. In a row that holds
infinity these elements share the whole weight equally. A row of minus infinity alone, and one that
`where` masks throughout, has no weight to share: softmax is 0 there, log_softmax and logsumexp
minus infinity, and every gradient 0. jax.nn answers both with NaN.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.activation.pointwise import once
from flax_customgrad.numerics.dtypes import (
    as_array,
    in_dtype,
    takes_custom_backward,
    widened,
)

ReductionAxes = int | tuple[int, ...] | None
"""The axes of a row: one, several, or None for all."""


class Rows(NamedTuple):
    """What the exponentials of each row start from and add up to; reduced axes have size 1."""

    m: jax.Array
    s: jax.Array

    def weigh(self, e: jax.Array, g: ArrayLike = 1) -> jax.Array:
        """The softmax, from its exponentials, times a number for each row."""
        return e * (g / _above_zero(self.s))


def _above_zero(s: jax.Array) -> jax.Array:
    """A sum of exponentials, of which the largest is 1; or, in a row without weight, not 0."""
    return jnp.maximum(s, 0.5)


def _largest(x: jax.Array, axis: ReductionAxes) -> jax.Array:
    return lax.stop_gradient(jnp.max(x, axis, initial=-jnp.inf, keepdims=True))


def _shifted(x: jax.Array, m: jax.Array) -> jax.Array:
    """X - m, and its limit where m is infinite, without a second use of x, which XLA would store.

    Infinity cannot be subtracted from itself. The largest finite number can, twice: that leaves
    infinity, for which the minimum puts 0, and takes everything finite to minus infinity. The
    minimum is not with 0, where it would halve the second derivative of the largest element.
    Nothing here compares or selects, which XLA on a CPU would not fuse with the sums.
    """
    limits = jnp.finfo(x.dtype)
    finite = jnp.clip(m, limits.min, limits.max)
    rest = jnp.clip(m - finite, 0, limits.max)
    return jnp.minimum(x - finite - rest, limits.tiny)


@custom_vjp
def _softmax(x: jax.Array, axis: ReductionAxes) -> jax.Array:
    return _softmax_value(axis, x)


def _softmax_fwd(
    x: jax.Array, axis: ReductionAxes
) -> tuple[jax.Array, tuple[jax.Array, ReductionAxes]]:
    y = _softmax(x, axis)
    return y, (y, axis)


def _softmax_bwd(res: tuple[jax.Array, ReductionAxes], g: jax.Array) -> tuple[jax.Array, None]:
    y, axis = res
    return _softmax_gradient(axis, y, g), None


@once
def _softmax_value(axis: ReductionAxes, x: jax.Array) -> jax.Array:
    (wide,) = widened(x.dtype, x)
    m = _largest(wide, axis)
    e = jnp.exp(_shifted(wide, m))
    rows = Rows(m, jnp.sum(e, axis, keepdims=True))
    return in_dtype(rows.weigh(e), x.dtype)


@once
def _softmax_gradient(axis: ReductionAxes, y: jax.Array, g: jax.Array) -> jax.Array:
    y, g = widened(g.dtype, y, g)
    return y * (g - jnp.sum(g * y, axis, keepdims=True))


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


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
    """
    x, axis = as_array(x), _axes(axis)
    if not takes_custom_backward(x):
        return jax.nn.softmax(x, axis, where)
    return _softmax(_masked(x, where), axis)


class _LogSoftmaxResiduals(NamedTuple):
    """What the backward of `log_softmax` keeps; `weight` is a number a row, 0 or 1."""

    y: jax.Array
    weight: jax.Array
    axis: ReductionAxes


@custom_vjp
def _log_softmax(x: jax.Array, axis: ReductionAxes) -> jax.Array:
    return _log_softmax_value(axis, x)[0]


def _log_softmax_fwd(x: jax.Array, axis: ReductionAxes) -> tuple[jax.Array, _LogSoftmaxResiduals]:
    y, weight = _log_softmax_value(axis, x)
    return y, _LogSoftmaxResiduals(y, weight, axis)


def _log_softmax_bwd(res: _LogSoftmaxResiduals, g: jax.Array) -> tuple[jax.Array, None]:
    return _log_softmax_gradient(res.axis, res.y, res.weight, g), None


@once
def _log_softmax_value(axis: ReductionAxes, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    (wide,) = widened(x.dtype, x)
    shifted = _shifted(wide, _largest(wide, axis))
    s = jnp.sum(jnp.exp(shifted), axis, keepdims=True)
    return in_dtype(shifted - jnp.log(_above_zero(s)), x.dtype), jnp.minimum(s, 1)


@once
def _log_softmax_gradient(
    axis: ReductionAxes, y: jax.Array, weight: jax.Array, g: jax.Array
) -> jax.Array:
    y, g = widened(g.dtype, y, g)
    return weight * (g - jnp.exp(y) * jnp.sum(g, axis, keepdims=True))


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)


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
    """
    x, axis = as_array(x), _axes(axis)
    if not takes_custom_backward(x):
        return jax.nn.log_softmax(x, axis, where)
    return _masked(_log_softmax(_masked(x, where), axis), where)


@custom_vjp
def _logsumexp(x: jax.Array, axis: ReductionAxes) -> jax.Array:
    return _logsumexp_value(axis, x)[0]


def _logsumexp_fwd(x: jax.Array, axis: ReductionAxes) -> tuple[jax.Array, tuple[jax.Array, Rows]]:
    y, rows = _logsumexp_value(axis, x)
    return y, (x, rows)


def _logsumexp_bwd(res: tuple[jax.Array, Rows], g: jax.Array) -> tuple[jax.Array, None]:
    return _logsumexp_gradient(*res, g), None


@once
def _logsumexp_value(axis: ReductionAxes, x: jax.Array) -> tuple[jax.Array, Rows]:
    (wide,) = widened(x.dtype, x)
    m = _largest(wide, axis)
    s = jnp.sum(jnp.exp(_shifted(wide, m)), axis, keepdims=True)
    return in_dtype(m + jnp.log(s), x.dtype), Rows(m, s)


@jax.jit
def _logsumexp_gradient(x: jax.Array, rows: Rows, g: jax.Array) -> jax.Array:
    x, g = widened(g.dtype, x, g)
    return rows.weigh(jnp.exp(_shifted(x, rows.m)), g)


_logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)


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
    """
    a, axis = as_array(a), _axes(axis)
    if b is not None or return_sign or not takes_custom_backward(a):
        return jax.nn.logsumexp(a, axis, b, keepdims, return_sign, where)
    y = _logsumexp(_masked(a, where), axis)
    return y if keepdims else jnp.squeeze(y, axis)


def _axes(axis: int | Sequence[int] | None) -> ReductionAxes:
    return tuple(axis) if isinstance(axis, Sequence) else axis


def _masked(x: Any, where: ArrayLike | None) -> jax.Array:
    return x if where is None else jnp.where(where, x, -jnp.inf)
