"""Sigmoid cross entropy: a loss for each logit, of which each is a decision of its own.

    forward   loss    = (1 - y) max(x, 0) + y max(-x, 0) + log(1 + exp(-|x|))
    backward  dx      = g ((1 - y) s(x) - y s(-x)),  s the sigmoid
              dy      = -g x
    kept      x and y

With e = exp(-|x|), the larger of s(x) and s(-x) is 1 / (1 + e), and the smaller e / (1 + e).

That is `-y log sigmoid(x) - (1 - y) log sigmoid(-x)`, without a difference of large numbers: for a
right decision loss and gradient are tiny, and neither is rounded to 0. An infinite x counts as the
largest finite number.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.dtypes import as_array, widened
from flax_customgrad.numerics.elementwise import Elementwise, elementwise


@dataclass(frozen=True)
class SigmoidCrossEntropy(Elementwise):
    """The loss as an elementwise function of logits x and labels y; it is float32 or wider."""

    def primal(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The losses."""
        x, y = _wide(x, *parameters)
        loss = (1 - y) * jnp.maximum(x, 0) + y * jnp.maximum(-x, 0)
        return loss + jnp.log1p(jnp.exp(-jnp.abs(x)))

    def residuals(self, x: jax.Array, y: Any, *parameters: Any) -> tuple[Any, ...]:
        """Logits and labels."""
        return x, *parameters

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[jax.Array, ...]:
        """Those of logits and labels."""
        x, y = _wide(*kept)
        e = jnp.exp(-jnp.abs(x))
        larger = 1 / (1 + e)
        smaller, is_positive = e * larger, x > 0
        yes = jnp.where(is_positive, larger, smaller)
        no = jnp.where(is_positive, smaller, larger)
        return g * ((1 - y) * yes - y * no), -g * x


def _wide(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finite logits, and labels, in float32 or wider."""
    (x,) = widened(accumulator(x), x)
    limits = jnp.finfo(x.dtype)
    return jnp.clip(x, limits.min, limits.max), y.astype(x.dtype)


_SIGMOID_CROSS_ENTROPY = SigmoidCrossEntropy()


def sigmoid_binary_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """The cross entropy of the sigmoid of each logit.

    Called as `optax.sigmoid_binary_cross_entropy`, it computes the same. Half precision is computed
    in float32, which the losses have too; an infinite logit has a finite loss and gradient.

    Args:
        logits: array of any shape, real floating numbers.
        labels: the probability that each decision is yes, from 0 to 1, which broadcasts against the
            logits. Floating numbers have a gradient.

    Returns:
        Losses of the shape that both broadcast to, float32 or wider.

    Raises:
        TypeError: the logits are not real floating numbers.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.sigmoid_binary_cross_entropy(jnp.array([0.0, 100.0]), jnp.array([1, 0]))
        Array([  0.6931472, 100.       ], dtype=float32)
    """
    logits, labels = jnp.asarray(as_array(logits)), jnp.asarray(as_array(labels))
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"sigmoid_binary_cross_entropy: logits are {logits.dtype}; expected real floating "
            "numbers"
        )
    return elementwise(logits, (labels,), _SIGMOID_CROSS_ENTROPY)
