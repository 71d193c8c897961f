"""Cross entropy of rows of logits with integer labels: its arithmetic, which two losses share.

    m = max x,  s = sum exp(x - m),  lse = m + log(s)                  over each row
    y     = (1 - label_smoothing) [k = label] + label_smoothing / K    of K classes that count
    loss  = log(s) - sum y (x - m) + z_loss lse^2
    slope = (1 + 2 z_loss lse) exp(x - m) / s - y                      dloss / dx

A row whose label is no class, such as -1, has loss and slope 0. A row of minus infinity alone has
no weight to move (`softmax_rows`): its loss is infinite and its slope 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flax_customgrad.layers.activation.softmax_rows import (
    exponent,
    minus_max,
    nonzero,
    only_where,
    row_max,
)
from flax_customgrad.numerics.dtypes import widened

Axes = tuple[int, ...]
Minus = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class CrossEntropyConfig:
    """The choices of a cross entropy that are not arrays.

    Attributes:
        axes: the axes of the classes; with integer labels one.
        label_smoothing: the share of a label that all classes have alike.
        z_loss: the weight of the square of lse.
    """

    axes: Axes = (-1,)
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def row_sums(
    x: jax.Array, where: jax.Array | None, axes: Axes, minus: Minus
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The maximum m of each row, `x - m` and s, all of the classes that count.

    Args:
        x: logits, float.
        where: which classes of which rows count, broadcast against x; None for all.
        axes: the axes of the classes.
        minus: computes `x - m`: `minus_max`; `exponent`, or a plain difference, which is no number
            where m is infinite.

    Returns:
        m, with axes of size 1 for the classes; `x - m`, of x's shape, minus infinity where a class
        does not count; s, like m. All in float32 or wider.
    """
    x = only_where(x, where)
    # The maximum is that of x before it is widened: XLA would store a wide x for both.
    x, m = widened(x.dtype, x, row_max(x, axes))
    shifted = minus(x, m)
    return m, shifted, jnp.sum(jnp.exp(shifted), axes, keepdims=True)


def log_sum(m: jax.Array, s: jax.Array) -> jax.Array:
    """`lse`, of finite size: an infinite one times a probability of 0 is 0."""
    limits = jnp.finfo(m.dtype)
    return jnp.clip(m, limits.min, limits.max) + jnp.log(nonzero(s))


def has_class(labels: jax.Array, where: jax.Array | None, axes: Axes) -> jax.Array:
    """Which rows have a label that is a class, and any class that counts.

    Args:
        labels: -1 for none; the axis of the classes has size 1.
        where: as in `row_sums`.
        axes: the axis of the classes.
    """
    is_class = labels >= 0
    return is_class if where is None else is_class & jnp.any(where, axes, keepdims=True)


def count(x: jax.Array, where: jax.Array | None, axes: Axes) -> jax.Array:
    """K of each row: how many of its classes count, at least 1; x is of any float dtype."""
    mask = jnp.ones_like(x) if where is None else jnp.broadcast_to(where, x.shape).astype(x.dtype)
    return jnp.maximum(jnp.sum(mask, axes, keepdims=True), 1)


def row_losses(
    x: jax.Array,
    labels: jax.Array,
    where: jax.Array | None,
    config: CrossEntropyConfig,
    minus: Minus | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The losses of rows.

    Args:
        x: logits, float.
        labels: numbers of classes, -1 for none; the axis of the classes has size 1.
        where: as in `row_sums`.
        config: the axis of the classes, and the choices.
        minus: as in `row_sums`; None for what gives the limits.

    Returns:
        The losses, m and s, each like `labels`, float32 or wider.
    """
    axes, smoothing = config.axes, config.label_smoothing
    (axis,) = axes
    # Taken before x is widened: XLA would store a wide x to take them from.
    of_label = jnp.take_along_axis(x, jnp.maximum(labels, 0), axis)
    (of_label,) = widened(x.dtype, of_label)
    # The sum of all shifted logits, which smoothing takes, is infinite where one is.
    m, shifted, s = row_sums(x, where, axes, minus or (minus_max if smoothing else exponent))
    is_beyond = of_label > m  # The class of the label does not count, and its logit is taken as is.
    of_label = jnp.where(is_beyond, of_label - m, minus_max(of_label, m))
    target = (1 - smoothing) * of_label
    if smoothing:
        mass = shifted if where is None else jnp.where(where, shifted, 0)
        target += smoothing * jnp.sum(mass, axes, keepdims=True) / count(mass, where, axes)
    losses = jnp.log(nonzero(s)) - target
    if config.z_loss:
        losses += config.z_loss * jnp.square(log_sum(m, s))
    return jnp.where(has_class(labels, where, axes), losses, 0), m, s


def row_slopes(
    x: jax.Array,
    labels: jax.Array,
    where: jax.Array | None,
    m: jax.Array,
    s: jax.Array,
    g: jax.Array,
    config: CrossEntropyConfig,
) -> jax.Array:
    """The slope of each loss, times a cotangent.

    Args:
        x: logits, float32 or wider.
        labels: as in `row_losses`.
        where: as in `row_sums`.
        m: what `row_losses` returned.
        s: what `row_losses` returned.
        g: the cotangents of the losses, like `labels`.
        config: as in `row_losses`.

    Returns:
        Array like x; 0 in rows without a class or without weight.
    """
    axes, smoothing = config.axes, config.label_smoothing
    (axis,) = (axis % x.ndim for axis in axes)
    others = [n for n in range(x.ndim) if n != axis]
    classes = jnp.expand_dims(jnp.arange(x.shape[axis]), others)
    y = (1 - smoothing) * (classes == labels)
    if smoothing:
        share = smoothing / count(x, where, axes)
        y += share if where is None else jnp.where(where, share, 0)
    factor = 1 + 2 * config.z_loss * log_sum(m, s) if config.z_loss else 1
    p = jnp.exp(exponent(only_where(x, where), m)) / nonzero(s)
    has_slope = has_class(labels, where, axes) & (s != 0)
    return jnp.where(has_slope, g * (factor * p - y), 0)
