"""SteTern: -1, 0 or 1.

    forward   y  = sign(x) where |x| > threshold, else 0;  threshold a number, or 0.7 mean |x|
    backward  dx = g where |x| <= clip_value, or g everywhere
    kept      a mask, one byte an element, or nothing

The bound is inclusive, |x| = threshold gives 0, and NaN stays NaN. The threshold 0.7 mean |x| is
that of ternary weight networks, arXiv:1605.04711: of the whole array, and a constant to the
gradient. Their scale is left to the next layer.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.estimators.rounding.sign import sign
from flax_customgrad.estimators.rounding.step import Step, keep_none, keep_within, straight_through
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_clip_value
from flax_customgrad.numerics.packing import masked


def _ternary(x: jax.Array, threshold: Any, *clip_value: Any) -> jax.Array:
    return jnp.where(jnp.abs(x) <= threshold, 0, sign(x))


def _keep_mask(x: jax.Array, threshold: Any, clip_value: float) -> tuple[jax.Array]:
    return keep_within(x, clip_value)


_TERNARY = Step("SteTern", _ternary, masked, _keep_mask)
_TERNARY_STRAIGHT_THROUGH = Step("SteTern", _ternary, straight_through, keep_none)


class SteTern(nnx.Module):
    """The sign of large elements, and 0 for small ones.

    Args:
        threshold: values up to this magnitude become 0; "twn" for 0.7 times the mean magnitude of
            the array.
        clip_value: the gradient passes where |x| <= clip_value; None for everywhere.

    Raises:
        ValueError: `threshold` is negative or a word other than "twn", or `clip_value` is not
            positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.SteTern("twn")(jnp.array([-2.0, 0.1, 0.0, 1.0]))
        Array([-1.,  0.,  0.,  1.], dtype=float32)

    Source: arXiv:1605.04711
    """

    def __init__(self, threshold: float | Literal["twn"] = 0.05, clip_value: float | None = 1.0):
        if threshold != "twn" and (isinstance(threshold, str) or not threshold >= 0):
            raise ValueError(
                f'SteTern: threshold={threshold!r} must be a number from 0 on, or "twn"'
            )
        self.threshold = threshold
        self.clip_value = check_clip_value("SteTern", clip_value)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The ternary value of each element.

        Args:
            x: array of any shape.

        Returns:
            Array like x, of -1, 0 and 1.
        """
        threshold = self.threshold
        if threshold == "twn":
            x = jnp.asarray(x)
            threshold = 0.7 * jnp.mean(jnp.abs(lax.stop_gradient(x).astype(accumulator(x))))
        if self.clip_value is None:
            return _TERNARY_STRAIGHT_THROUGH(x, threshold)
        return _TERNARY(x, threshold, self.clip_value)
