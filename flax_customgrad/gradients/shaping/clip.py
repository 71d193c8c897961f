"""Gradient clip: the identity, whose backward clips the cotangent by value or by norm.

By value, element by element:

    forward   y  = x
    backward  dx = g                  where |g| <= limit
                   limit sign(g)      elsewhere
    kept      limit

By norm, with sums over `axes`:

    forward   y  = x
    backward  dx = g                  where norm(g) <= limit,  norm(g) = sqrt(sum g^2)
                   limit g / norm(g)  elsewhere
    computed  with u = g / unit and norm = norm(u), for a power of two `unit` about as large as g:
              norm(g) <= limit is norm <= limit / unit, and limit g / norm(g) is u limit / norm
    kept      limit

It clips the gradient of one activation where it passes, and with it of all that lies before;
`optax.clip` clips that of parameters afterwards. A cotangent of exactly the limit passes as it is.

The norm is that of the whole gradient, or of each example: the sum runs over all axes but the batch
axes. It is computed in float32 of `u`, so that elements of 1e30 do not overflow, those of 1e-30 do
not vanish, and zeros stay zeros. A gradient with an element that is not finite has no norm to clip
to and passes as it is; by value infinity becomes the limit, and NaN stays.

Source: arXiv:1211.5063
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.gradients.shaping.shaping_arguments import (
    NumberOrArray,
    Schedule,
    check_broadcasts,
    check_number_or_array,
    check_setting,
    map_arrays,
    value_at_step,
)
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import integers
from flax_customgrad.numerics.scaling import magnitude


class ValueResiduals(NamedTuple):
    """What the backward of `clip_cotangent_by_value` keeps."""

    limit: NumberOrArray


@custom_vjp(surrogate=True)
def clip_cotangent_by_value(x: jax.Array, limit: NumberOrArray) -> jax.Array:
    """Returns `x`.

    Args:
        x: array of any shape, float.
        limit: bound on each element of the cotangent: a number, or an array that broadcasts to `x`.
    """
    return x


def _fwd_by_value(x: jax.Array, limit: NumberOrArray) -> tuple[jax.Array, ValueResiduals]:
    return clip_cotangent_by_value(x, limit), ValueResiduals(limit)


def _bwd_by_value(res: ValueResiduals, g: jax.Array) -> tuple[jax.Array, None]:
    limit, g = res.limit, g.astype(accumulator(g))
    chex.assert_is_broadcastable(jnp.shape(limit), g.shape)
    dx = jnp.where(jnp.abs(g) > limit, limit * jnp.sign(g), g)
    chex.assert_equal_shape([dx, g])
    return dx, None


clip_cotangent_by_value.defvjp(_fwd_by_value, _bwd_by_value)


class NormResiduals(NamedTuple):
    """What the backward of `clip_cotangent_by_norm` keeps."""

    limit: NumberOrArray
    axes: tuple[int, ...]


@custom_vjp(surrogate=True)
def clip_cotangent_by_norm(x: jax.Array, limit: NumberOrArray, axes: tuple[int, ...]) -> jax.Array:
    """Returns `x`.

    Args:
        x: array of any shape, float.
        limit: bound on the norm of the cotangent: a number, or an array without axes.
        axes: the axes over which a norm sums.
    """
    return x


def _fwd_by_norm(
    x: jax.Array, limit: NumberOrArray, axes: tuple[int, ...]
) -> tuple[jax.Array, NormResiduals]:
    return clip_cotangent_by_norm(x, limit, axes), NormResiduals(limit, axes)


def _bwd_by_norm(res: NormResiduals, g: jax.Array) -> tuple[jax.Array, None, None]:
    limit, g = res.limit, g.astype(accumulator(g))
    # The result does not depend on the unit, so neither do its derivatives.
    unit = magnitude(g, res.axes)
    u = g / unit
    squares = jnp.sum(u**2, res.axes, keepdims=True)
    has_norm = (squares > 0) & jnp.isfinite(squares)
    norm = jnp.sqrt(jnp.where(has_norm, squares, 1))
    chex.assert_rank(limit, 0)
    chex.assert_shape([unit, norm], [1 if i in res.axes else n for i, n in enumerate(g.shape)])
    dx = jnp.where(has_norm & (norm > limit / unit), u * (limit / norm), g)
    chex.assert_equal_shape([dx, g])
    return dx, None, None


clip_cotangent_by_norm.defvjp(_fwd_by_norm, _bwd_by_norm)


def gradient_clip(
    x: Any,
    *,
    max_value: NumberOrArray | None = None,
    max_norm: NumberOrArray | None = None,
    batch_axes: int | Sequence[int] = (),
) -> Any:
    """The identity, with a gradient that is clipped by value or by norm.

    Under `jit` on a mesh the norm is that of the whole gradient, under `shard_map` that of each
    device's part, under `vmap` that of each example.

    Args:
        x: array of any shape, real, or a tree of arrays, each clipped on its own. Integers have no
            gradient and pass as they are.
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

    Source: arXiv:1211.5063
    """
    _check_choice("gradient_clip", max_value, max_norm, batch_axes)
    name = "max_norm" if max_value is None else "max_value"
    limit = check_number_or_array(
        f"gradient_clip: {name}", max_norm if max_value is None else max_value, positive=True
    )
    if max_value is None and jnp.ndim(limit):
        raise ValueError(
            f"gradient_clip: max_norm has shape {limit.shape}; write a number or an array "
            "without axes"
        )

    def shape(x: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(x):
            raise TypeError(f"gradient_clip: x is an array of {x.dtype}; it clips real gradients")
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        if max_value is not None:
            check_broadcasts("gradient_clip: max_value", limit, x)
            return clip_cotangent_by_value(x, limit) if inexact else x
        axes = _all_axes_but(batch_axes, x.ndim)
        return clip_cotangent_by_norm(x, limit, axes) if inexact else x

    return map_arrays(shape, x)


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

    Source: arXiv:1211.5063
    """

    def __init__(
        self,
        *,
        max_value: NumberOrArray | Schedule | None = None,
        max_norm: NumberOrArray | Schedule | None = None,
        batch_axes: int | Sequence[int] = (),
    ):
        _check_choice("GradientClip", max_value, max_norm, batch_axes)
        self.max_value = _check_limit("GradientClip: max_value", max_value)
        self.max_norm = _check_limit("GradientClip: max_norm", max_norm)
        self.batch_axes = integers(batch_axes)

    def __call__(self, x: Any, step: Any = None) -> Any:
        """Applies the layer.

        Args:
            x: array of any shape, real, or a tree of arrays.
            step: what the schedule takes, if there is one; not looked at otherwise.

        Returns:
            x.

        Raises:
            TypeError: the limit is a schedule and there is no step, or x is complex.
            ValueError: the limit does not broadcast to x, or x has no such axis.
        """
        return gradient_clip(
            x,
            max_value=value_at_step("GradientClip: max_value", self.max_value, step),
            max_norm=value_at_step("GradientClip: max_norm", self.max_norm, step),
            batch_axes=self.batch_axes,
        )


def _check_choice(name: str, max_value: Any, max_norm: Any, batch_axes: Any) -> None:
    if (max_value is None) == (max_norm is None):
        given = "neither" if max_value is None else "both"
        raise ValueError(
            f"{name} takes max_value or max_norm, and {given} was given: write max_value=1.0 to "
            "clip each element, or max_norm=1.0 to clip the norm"
        )
    if max_norm is None and integers(batch_axes):
        raise ValueError(
            f"{name}: batch_axes={batch_axes!r} says what has a norm of its own, and max_value "
            "has no use for it"
        )


def _check_limit(name: str, limit: NumberOrArray | Schedule | None) -> Any:
    return None if limit is None else check_setting(name, limit, positive=True)


def _all_axes_but(batch_axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """The axes that share a norm; batch axes may be negative."""
    batch = integers(batch_axes)
    if any(not -ndim <= axis < ndim for axis in batch):
        raise ValueError(
            f"gradient_clip: batch_axes={batch_axes!r} names an axis that x, of {ndim} axes, does "
            "not have"
        )
    return tuple(axis for axis in range(ndim) if not {axis, axis - ndim} & set(batch))
