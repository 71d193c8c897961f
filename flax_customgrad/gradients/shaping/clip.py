"""Gradient clip: the identity, with a gradient that is kept small, by value or by norm.

    forward   y  = x
    backward  dx = g where |g| <= c, c sign(g) elsewhere        by value, element by element
              dx = g where |g| <= c, c g / |g| elsewhere        by norm, |g| = sqrt(sum g^2)
    kept      c

It clips the gradient of one activation where it passes, and with it of all that lies before;
`optax.clip` clips that of parameters afterwards. A g of exactly the limit passes as it is.

The norm is that of the whole gradient, or of each example: the sum runs over all axes but the batch
axes. It is computed in float32 of g divided by a power of two, so that elements of 1e30 do not
overflow, those of 1e-30 do not vanish, and zeros stay zeros. A gradient with an element that is not
finite has no norm to clip to and passes as it is; by value infinity becomes c, and NaN stays.
arXiv:1211.5063.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.gradients.shaping.amount import (
    Amount,
    Schedule,
    at_step,
    check_broadcasts,
    checked,
)
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.scaling import magnitude


class ByValue(NamedTuple):
    """What the backward of `clipped_by_value` keeps."""

    limit: Amount


@custom_vjp(surrogate=True)
def clipped_by_value(x: jax.Array, limit: Amount) -> jax.Array:
    """Returns x.

    Args:
        x: array of any shape, float.
        limit: of each element of its gradient: a number, or an array that broadcasts to x.
    """
    return x


def _fwd_by_value(x: jax.Array, limit: Amount) -> tuple[jax.Array, ByValue]:
    return clipped_by_value(x, limit), ByValue(limit)


def _bwd_by_value(res: ByValue, g: jax.Array) -> tuple[jax.Array, None]:
    g = g.astype(accumulator(g))
    dx = jnp.where(jnp.abs(g) > res.limit, res.limit * jnp.sign(g), g)
    chex.assert_equal_shape([dx, g])
    return dx, None


clipped_by_value.defvjp(_fwd_by_value, _bwd_by_value)


class ByNorm(NamedTuple):
    """What the backward of `clipped_by_norm` keeps."""

    limit: Amount
    axes: tuple[int, ...]


@custom_vjp(surrogate=True)
def clipped_by_norm(x: jax.Array, limit: Amount, axes: tuple[int, ...]) -> jax.Array:
    """Returns x.

    Args:
        x: array of any shape, float.
        limit: of the norm of its gradient: a number, or an array without axes.
        axes: what shares a norm.
    """
    return x


def _fwd_by_norm(x: jax.Array, limit: Amount, axes: tuple[int, ...]) -> tuple[jax.Array, ByNorm]:
    return clipped_by_norm(x, limit, axes), ByNorm(limit, axes)


def _bwd_by_norm(res: ByNorm, g: jax.Array) -> tuple[jax.Array, None, None]:
    g = g.astype(accumulator(g))
    # The result does not depend on what g is divided by, so neither do its derivatives.
    unit = magnitude(g, res.axes)
    squares = jnp.sum((g / unit) ** 2, res.axes, keepdims=True)
    has_norm = (squares > 0) & jnp.isfinite(squares)
    norm = jnp.sqrt(jnp.where(has_norm, squares, 1))
    beyond = has_norm & (norm > res.limit / unit)
    dx = jnp.where(beyond, g / unit * (res.limit / norm), g)
    chex.assert_equal_shape([dx, g])
    return dx, None, None


clipped_by_norm.defvjp(_fwd_by_norm, _bwd_by_norm)


def gradient_clip(
    x: Any,
    *,
    max_value: Amount | None = None,
    max_norm: Amount | None = None,
    batch_axes: int | Sequence[int] = (),
) -> jax.Array:
    """The identity, with a gradient that is clipped by value or by norm.

    Under `jit` on a mesh the norm is that of the whole gradient, under `shard_map` that of each
    device's part, under `vmap` that of each example.

    Args:
        x: array of any shape, real. Integers have no gradient and pass as they are.
        max_value: limit of each element: a positive number, or an array that broadcasts to x.
        max_norm: limit of the norm: a positive number, or an array without axes.
        batch_axes: the axes of x along which each entry has a norm of its own: 0 for each example,
            (0, 1) for each token of a batch; none for one norm of all.

    Returns:
        x.

    Raises:
        ValueError: not exactly one of `max_value` and `max_norm` is given; a limit is a number
            that is not positive, or an array of another shape; `batch_axes` is given without
            `max_norm`, or names an axis that x does not have.
        TypeError: x is complex, or a limit is no number or array.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> x = jnp.array([[3.0, 4.0], [0.3, 0.4]])
        >>> jax.grad(lambda x: jnp.sum(fcg.gradient_clip(x, max_norm=2.0, batch_axes=0) ** 2))(x)
        Array([[1.2, 1.6],
               [0.6, 0.8]], dtype=float32)
    """
    _check_choice("gradient_clip", max_value, max_norm, batch_axes)
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        raise TypeError(f"gradient_clip: x is an array of {x.dtype}; it clips real gradients")
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    if max_value is not None:
        limit = checked("gradient_clip: max_value", max_value, positive=True)
        check_broadcasts("gradient_clip: max_value", limit, x)
        return clipped_by_value(x, limit) if inexact else x
    limit = checked("gradient_clip: max_norm", max_norm, positive=True)
    if jnp.ndim(limit):
        raise ValueError(
            f"gradient_clip: max_norm has shape {limit.shape}; write a number or an array "
            "without axes"
        )
    axes = _others(batch_axes, x.ndim)
    return clipped_by_norm(x, limit, axes) if inexact else x


class GradientClip(nnx.Module):
    """The identity, with a gradient that is clipped by value or by norm.

    Attributes:
        max_value: limit of each element: a positive number, an array that broadcasts to the
            inputs, or a schedule, a function of a step; or None.
        max_norm: limit of the norm: a positive number, an array without axes, or a schedule; or
            None.
        batch_axes: the axes along which each entry has a norm of its own: 0 for each example,
            (0, 1) for each token of a batch; none for one norm of all.

    Raises:
        ValueError: not exactly one of `max_value` and `max_norm` is given; a limit is a number
            that is not positive; `batch_axes` is given without `max_norm`.
        TypeError: a limit is neither number, array nor schedule.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> layer = fcg.GradientClip(max_value=1.0)
        >>> jax.grad(lambda x: jnp.sum(layer(x) ** 2))(jnp.array([-3.0, 0.2]))
        Array([-1. ,  0.4], dtype=float32)
    """

    def __init__(
        self,
        *,
        max_value: Amount | Schedule | None = None,
        max_norm: Amount | Schedule | None = None,
        batch_axes: int | Sequence[int] = (),
    ):
        _check_choice("GradientClip", max_value, max_norm, batch_axes)
        self.max_value = _checked_limit("GradientClip: max_value", max_value)
        self.max_norm = _checked_limit("GradientClip: max_norm", max_norm)
        self.batch_axes = batch_axes if isinstance(batch_axes, int) else tuple(batch_axes)

    def __call__(self, x: Any, step: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            x: array of any shape, real.
            step: what the schedule takes, if there is one; not looked at otherwise.

        Returns:
            x.

        Raises:
            TypeError: the limit is a schedule and there is no step, or x is complex.
            ValueError: the limit does not broadcast to x, or x has no such axis.
        """
        return gradient_clip(
            x,
            max_value=at_step("GradientClip: max_value", self.max_value, step),
            max_norm=at_step("GradientClip: max_norm", self.max_norm, step),
            batch_axes=self.batch_axes,
        )


def _check_choice(name: str, max_value: Any, max_norm: Any, batch_axes: Any) -> None:
    if (max_value is None) == (max_norm is None):
        given = "neither" if max_value is None else "both"
        raise ValueError(
            f"{name} takes max_value or max_norm, and {given} was given: write max_value=1.0 to "
            "clip each element, or max_norm=1.0 to clip the norm"
        )
    if max_norm is None and batch_axes != ():
        raise ValueError(
            f"{name}: batch_axes={batch_axes!r} says what has a norm of its own, and max_value "
            "has no use for it"
        )


def _checked_limit(name: str, limit: Amount | Schedule | None) -> Any:
    return limit if limit is None or callable(limit) else checked(name, limit, positive=True)


def _others(batch_axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """All axes but some, which may be counted from the last."""
    batch = (batch_axes,) if isinstance(batch_axes, int) else tuple(batch_axes)
    if any(not -ndim <= axis < ndim for axis in batch):
        raise ValueError(
            f"gradient_clip: batch_axes={batch_axes!r} names an axis that x, of {ndim} axes, does "
            "not have"
        )
    return tuple(axis for axis in range(ndim) if not {axis, axis - ndim} & set(batch))
