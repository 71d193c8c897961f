"""Softmax cross entropy with labels that are distributions.

    forward   y    = (1 - label_smoothing) labels + label_smoothing t / K,  t = sum labels
              logp = x - m - log(s)                   m, s, lse, K as in `cross_entropy_rows`
              loss = -sum y logp + z_loss lse^2
    backward  dx   = g ((t + 2 z_loss lse) exp(x - m) / s - y)
              dlabels = -g ((1 - label_smoothing) logp + label_smoothing mean logp)
    kept      x and the labels, and of each row m and s

The labels y of a row sum to t, and the slope of lse is the softmax:

    loss       = t lse - sum y x + z_loss lse^2
    ∂lse/∂x_i  = exp(x_i - m) / s
    ∂loss/∂x_i = (t + 2 z_loss lse) exp(x_i - m) / s - y_i

0 log 0 is 0: a label of 0 at a logit of minus infinity adds nothing, and has the gradient 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.activation.softmax_rows import (
    minus_max,
    nonzero,
    only_where,
)
from flax_customgrad.layers.losses.cross_entropy_rows import (
    CrossEntropyConfig,
    Minus,
    count,
    log_sum,
    row_sums,
)
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.faster_on_one_cpu import faster_on_one_cpu, has_no_number
from flax_customgrad.numerics.inline_jit import inline_jit


class Residuals(NamedTuple):
    """What the backward of `cross_entropy_of_distributions` keeps."""

    x: jax.Array
    labels: jax.Array
    where: jax.Array | None
    m: jax.Array
    s: jax.Array
    config: CrossEntropyConfig


@custom_vjp
def cross_entropy_of_distributions(
    x: jax.Array, labels: jax.Array, where: jax.Array | None, config: CrossEntropyConfig
) -> jax.Array:
    """The loss of each row.

    Args:
        x: logits of any shape, float.
        labels: a distribution for each row, of x's shape, float.
        where: which classes of which rows count, broadcast against x; None for all.
        config: the axes of the classes, and the choices.

    Returns:
        Array of x's shape with axes of size 1 for the classes, float32 or wider.
    """
    return _losses_alone(config, x, labels, where)[0]


def _fwd(
    x: jax.Array, labels: jax.Array, where: jax.Array | None, config: CrossEntropyConfig
) -> tuple[jax.Array, Residuals]:
    losses, m, s = _losses(config, x, labels, where)
    return losses, Residuals(x, labels, where, m, s, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    x, labels, where, m, s, config = res
    chex.assert_equal_shape([g, m, s])
    dx, dlabels = _cotangents(config, x, labels, where, m, s, g)
    chex.assert_equal_shape([dx, dlabels, x, labels])
    return dx, dlabels, None, None


cross_entropy_of_distributions.defvjp(_fwd, _bwd)


@inline_jit(static_argnums=0)
def _losses(
    config: CrossEntropyConfig, x: jax.Array, labels: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _losses_by(minus_max, _log_probabilities, config, x, labels, where)


def _losses_on_one_cpu(
    config: CrossEntropyConfig, x: jax.Array, labels: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, Any]:
    out = _losses_by(lax.sub, _plain_log_probabilities, config, x, labels, where)
    return has_no_number(out[0], ()), out


# A backward computes x - m again, and XLA shares it with a forward that does as it does.
_losses_alone = inline_jit(static_argnums=0)(faster_on_one_cpu(_losses_on_one_cpu)(_losses))


def _losses_by(
    minus: Minus,
    log_probabilities: Callable[..., jax.Array],
    config: CrossEntropyConfig,
    x: jax.Array,
    labels: jax.Array,
    where: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    axes = config.axes
    x, labels = widened(jnp.result_type(x, labels), x, labels)
    m, shifted, s = row_sums(x, where, axes, minus)
    y = _smoothed(labels, where, config)
    logp = log_probabilities(shifted, s, labels, where)
    losses = -jnp.sum(y * logp, axes, keepdims=True)
    if config.z_loss:
        losses += config.z_loss * jnp.square(log_sum(m, s))
    if where is not None:
        losses = jnp.where(jnp.any(where, axes, keepdims=True), losses, 0)
    return losses, m, s


@inline_jit(static_argnums=0)
def _cotangents(
    config: CrossEntropyConfig,
    x: jax.Array,
    labels: jax.Array,
    where: jax.Array | None,
    m: jax.Array,
    s: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    axes, smoothing = config.axes, config.label_smoothing
    x, labels = widened(g.dtype, x, labels)
    shifted = minus_max(only_where(x, where), m)
    logp = _log_probabilities(shifted, s, labels, where)
    y = _smoothed(labels, where, config)
    factor = jnp.sum(y, axes, keepdims=True)
    if config.z_loss:
        factor += 2 * config.z_loss * log_sum(m, s)
    dx = g * (factor * jnp.exp(shifted) / nonzero(s) - y)
    dlabels = -g * (1 - smoothing) * logp
    if smoothing:
        mean = jnp.sum(logp, axes, keepdims=True) / count(x, where, axes)
        dlabels -= g * smoothing * (mean if where is None else jnp.where(where, mean, 0))
    return jnp.where(s != 0, dx, 0), jnp.where(s != 0, dlabels, 0)


def _smoothed(labels: jax.Array, where: jax.Array | None, config: CrossEntropyConfig) -> jax.Array:
    """y: the smoothed labels of the classes that count, 0 of the others."""
    axes, smoothing = config.axes, config.label_smoothing
    y = labels if where is None else jnp.where(where, labels, 0)
    if not smoothing:
        return y
    share = smoothing * jnp.sum(y, axes, keepdims=True) / count(labels, where, axes)
    y = (1 - smoothing) * y + share
    return y if where is None else jnp.where(where, y, 0)


def _plain_log_probabilities(
    shifted: jax.Array, s: jax.Array, labels: jax.Array, where: jax.Array | None
) -> jax.Array:
    logp = shifted - jnp.log(s)
    return logp if where is None else jnp.where(where, logp, 0)


def _log_probabilities(
    shifted: jax.Array, s: jax.Array, labels: jax.Array, where: jax.Array | None
) -> jax.Array:
    """Logp; 0 where a class does not count, and where both it and its label are impossible."""
    logp = shifted - jnp.log(nonzero(s))
    is_nothing = (labels == 0) & (logp == -jnp.inf)
    if where is not None:
        is_nothing |= ~where
    return jnp.where(is_nothing, 0, logp)
