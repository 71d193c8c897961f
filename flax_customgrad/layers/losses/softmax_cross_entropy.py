"""The softmax cross entropies of optax by their names, over the operations of this library.

What `softmax_cross_entropy` takes for labels, integers or distributions, decides which operation
computes it: `integer_labels` or `soft_labels`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_customgrad.layers.losses.cross_entropy_rows import CrossEntropyConfig
from flax_customgrad.layers.losses.integer_labels import cross_entropy_of_labels
from flax_customgrad.layers.losses.labels import check_share, class_numbers, static_number
from flax_customgrad.layers.losses.soft_labels import cross_entropy_of_distributions
from flax_customgrad.numerics.argument_checks import integers
from flax_customgrad.numerics.broadcasting import broadcasts
from flax_customgrad.numerics.dtypes import as_array


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int | None = None,
) -> jax.Array:
    """The cross entropy of softmax with integer labels or with distributions, a loss per example.

    Called as `optax.softmax_cross_entropy`, it computes the same, and 0 where a label of 0 meets a
    logit of minus infinity, where that has NaN. The backward keeps the logits, the labels and two
    numbers a row. Half precision is computed in float32, which the losses have too.

    Args:
        logits: array of any shape, real floating numbers.
        labels: integers with an axis less than the logits are numbers of classes. Everything else
            is a distribution for each example, which broadcasts against the logits: floating
            numbers, which have a gradient, and integers with as many axes.
        axis: the axis of the classes; of distributions also several, or None for all.
        where: what counts: a mask of the logits' shape, or of that without `axis`. An example of
            which nothing counts has loss 0.
        label_smoothing: the share of a label that is spread over all classes, from 0 to below 1.
        z_loss: weight of the square of the logarithm of the softmax's denominator, which is added.
        ignore_index: the label of examples that do not count: loss and gradient are 0.

    Returns:
        Losses of the logits' shape without `axis`, float32 or wider. Where the label is impossible,
        its logit minus infinity, the loss is infinite and the gradient finite. A label that is no
        class is an error; where labels are traced, its loss and gradient are 0.

    Raises:
        TypeError: the logits are not real floating numbers; `ignore_index` with distributions.
        ValueError: a label is no class; or shapes do not fit.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
        >>> losses = fcg.softmax_cross_entropy(logits, jnp.array([0, 1]))
        >>> [f"{loss:.3f}" for loss in losses]
        ['0.276', '2.952']
    """
    name = "softmax_cross_entropy"
    logits, labels = _logits(name, logits), jnp.asarray(as_array(labels))
    is_numbers = jnp.issubdtype(labels.dtype, jnp.integer) and labels.ndim < logits.ndim
    options = (
        check_share(name, "label_smoothing", label_smoothing),
        static_number(name, "z_loss", z_loss),
    )
    if is_numbers:
        if axis is None:
            axis = tuple(range(logits.ndim))
        return _of_numbers(name, logits, labels, axis, where, ignore_index, *options)
    if ignore_index is not None:
        raise TypeError(
            f"{name}: ignore_index={ignore_index!r} is for integer labels, and these are "
            "distributions: give `where`, or labels of 0"
        )
    return _of_distributions(name, logits, labels, axis, where, *options)


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int | None = None,
) -> jax.Array:
    """The cross entropy of softmax with integer labels, a loss per example.

    That is `softmax_cross_entropy` for integers alone, under its name in optax.

    Args:
        logits: array of any shape, real floating numbers.
        labels: integers of the logits' shape without `axis`.
        axis: the axis of the classes. With several, a label counts along them all, the last one
            fastest.
        where: what counts: a mask of the logits' shape, or of that without `axis`.
        label_smoothing: the share of a label that is spread over all classes, from 0 to below 1.
        z_loss: weight of the square of the logarithm of the softmax's denominator, which is added.
        ignore_index: the label of examples that do not count: loss and gradient are 0.

    Returns:
        Losses like `labels`, float32 or wider.

    Raises:
        TypeError: the logits are not real floating numbers, or the labels no integers.
        ValueError: a label is no class; or shapes do not fit.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> logits, labels = jnp.zeros((2, 4)), jnp.array([0, 3])
        >>> fcg.softmax_cross_entropy_with_integer_labels(logits, labels).shape
        (2,)
    """
    name = "softmax_cross_entropy_with_integer_labels"
    return _of_numbers(
        name,
        _logits(name, logits),
        jnp.asarray(as_array(labels)),
        axis,
        where,
        ignore_index,
        check_share(name, "label_smoothing", label_smoothing),
        static_number(name, "z_loss", z_loss),
    )


def _logits(name: str, logits: Any) -> jax.Array:
    logits = jnp.asarray(as_array(logits))
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"{name}: logits are {logits.dtype}; expected real floating numbers")
    return logits


def _of_numbers(
    name: str,
    logits: jax.Array,
    labels: jax.Array,
    axis: int | tuple[int, ...],
    where: Any,
    ignore_index: int | None,
    *options: float,
) -> jax.Array:
    """Losses with integer labels; several axes of classes become one, the last."""
    where = _mask(name, where, logits, axis)
    axes = _axes(name, axis, logits.ndim)
    if len(axes) != 1:
        logits = _last(logits, axes)
        where = None if where is None else _last(where, axes)
    axis = axes[0] if len(axes) == 1 else logits.ndim - 1
    classes, examples = logits.shape[axis], (*logits.shape[:axis], *logits.shape[axis + 1 :])
    shape = _broadcast(labels.shape, examples)
    if shape is None or len(shape) > len(examples):
        raise ValueError(
            f"{name}: labels have shape {labels.shape}, and the logits without the axis of their "
            f"{classes} classes {examples}"
        )
    labels = jnp.broadcast_to(labels, shape)
    rows = None if where is None else jnp.broadcast_to(jnp.any(where, axis), shape)
    labels = class_numbers(name, labels, classes, ignore_index, rows)
    logits = jnp.broadcast_to(logits, (*shape[:axis], classes, *shape[axis:]))
    losses = cross_entropy_of_labels(
        logits, jnp.expand_dims(labels, axis), where, CrossEntropyConfig((axis,), *options)
    )
    return jnp.squeeze(losses, axis)


def _of_distributions(
    name: str,
    logits: jax.Array,
    labels: jax.Array,
    axis: int | tuple[int, ...] | None,
    where: Any,
    *options: float,
) -> jax.Array:
    """Losses with labels that are distributions, which logits and labels are broadcast for."""
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        labels = labels.astype(logits.dtype)
    shape = _broadcast(logits.shape, labels.shape)
    if shape is None:
        raise ValueError(
            f"{name}: labels of shape {labels.shape} do not broadcast against logits of shape "
            f"{logits.shape}"
        )
    where = _mask(name, where, logits, axis)
    axes = _axes(name, axis, len(shape))
    losses = cross_entropy_of_distributions(
        jnp.broadcast_to(logits, shape),
        jnp.broadcast_to(labels, shape),
        where,
        CrossEntropyConfig(axes, *options),
    )
    return jnp.squeeze(losses, axes)


def _mask(
    name: str, where: Any, logits: jax.Array, axis: int | tuple[int, ...] | None
) -> jax.Array | None:
    """A mask with as many axes as the logits."""
    if where is None:
        return None
    where = jnp.asarray(as_array(where), bool)
    given = where.shape
    if where.ndim != logits.ndim:
        where = jnp.expand_dims(where, range(logits.ndim) if axis is None else axis)
    if not broadcasts(where.shape, logits.shape):
        raise ValueError(
            f"{name}: where has shape {given}, which is neither that of the logits, "
            f"{logits.shape}, nor that without axis={axis}"
        )
    return where


def _axes(name: str, axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """The axes of the classes, counted from the front."""
    if axis is None:
        return tuple(range(ndim))
    axes = integers(axis)
    if any(not -ndim <= n < ndim for n in axes) or len({n % ndim for n in axes}) < len(axes):
        raise ValueError(f"{name}: axis={axis!r} is not of logits with {ndim} axes")
    return tuple(n % ndim for n in axes)


def _last(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """An array with some of its axes merged into one behind the others."""
    others = tuple(n for n in range(array.ndim) if n not in axes)
    array = jnp.transpose(array, (*others, *axes))
    return array.reshape(*array.shape[: len(others)], -1)


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that shapes broadcast to, or None."""
    try:
        return jnp.broadcast_shapes(*shapes)
    except ValueError:
        return None
