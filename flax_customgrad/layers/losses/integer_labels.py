"""Softmax cross entropy with integer labels.

    forward   loss = log(s) - sum y (x - m) + z_loss lse^2   m, s, lse, y as in `cross_entropy_rows`
    backward  dx   = g ((1 + 2 z_loss lse) exp(x - m) / s - y)
    kept      x and the labels, and of each row m and s

The labels of a row sum to 1, so that m cancels; and the slope of lse is the softmax:

    loss       = lse - sum y x + z_loss lse^2
    ∂lse/∂x_i  = exp(x_i - m) / s
    ∂loss/∂x_i = (1 + 2 z_loss lse) exp(x_i - m) / s - y_i
"""

from typing import Any, NamedTuple

import chex
import jax
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.losses.cross_entropy_rows import (
    CrossEntropyConfig,
    row_losses,
    row_slopes,
)
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.faster_on_one_cpu import faster_on_one_cpu, has_no_number
from flax_customgrad.numerics.inline_jit import inline_jit


class Residuals(NamedTuple):
    """What the backward of `cross_entropy_of_labels` keeps."""

    x: jax.Array
    labels: jax.Array
    where: jax.Array | None
    m: jax.Array
    s: jax.Array
    config: CrossEntropyConfig


@custom_vjp
def cross_entropy_of_labels(
    x: jax.Array, labels: jax.Array, where: jax.Array | None, config: CrossEntropyConfig
) -> jax.Array:
    """The loss of each row.

    Args:
        x: logits of any shape, float.
        labels: numbers of classes, -1 for none, of x's shape but for an axis of size 1.
        where: which classes of which rows count, broadcast against x; None for all.
        config: the axis of the classes, and the choices.

    Returns:
        Array like `labels`, float32 or wider.
    """
    return _losses_alone(config, x, labels, where)[0]


def _fwd(
    x: jax.Array, labels: jax.Array, where: jax.Array | None, config: CrossEntropyConfig
) -> tuple[jax.Array, Residuals]:
    losses, m, s = _losses(config, x, labels, where)
    return losses, Residuals(x, labels, where, m, s, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None, None, None]:
    x, labels, where, m, s, config = res
    chex.assert_equal_shape([g, labels, m, s])
    dx = _cotangent(config, x, labels, where, m, s, g)
    chex.assert_equal_shape([dx, x])
    return dx, None, None, None


cross_entropy_of_labels.defvjp(_fwd, _bwd)


@inline_jit(static_argnums=0)
def _losses(
    config: CrossEntropyConfig, x: jax.Array, labels: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return row_losses(x, labels, where, config)


def _losses_on_one_cpu(
    config: CrossEntropyConfig, x: jax.Array, labels: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, Any]:
    out = row_losses(x, labels, where, config, lax.sub)
    return has_no_number(out[0], ()), out


# A backward computes x - m again, and XLA shares it with a forward that does as it does.
_losses_alone = inline_jit(static_argnums=0)(faster_on_one_cpu(_losses_on_one_cpu)(_losses))


@inline_jit(static_argnums=0)
def _cotangent(
    config: CrossEntropyConfig,
    x: jax.Array,
    labels: jax.Array,
    where: jax.Array | None,
    m: jax.Array,
    s: jax.Array,
    g: jax.Array,
) -> jax.Array:
    (x,) = widened(g.dtype, x)
    return row_slopes(x, labels, where, m, s, g, config)
