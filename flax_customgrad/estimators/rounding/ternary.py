"""SteTern: -1, 0 or 1.

    forward   y  = sign(x) where |x| > d, else 0;  d a number, or 0.7 mean |x|
    backward  dx = g where |x| <= c, or g everywhere
    kept      a mask, one byte an element, or nothing

The bound c is inclusive, |x| = d gives 0, and NaN stays NaN. The threshold 0.7 mean |x| is that of
ternary weight networks, arXiv:1605.04711, of the whole array, held for a constant; their scale is
left to what comes behind.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.estimators.rounding.sign import sign
from flax_customgrad.estimators.rounding.step import Step, keep_none, straight_through, where_kept
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_clip_value


def _ternary(x: jax.Array, threshold: Any, *bound: Any) -> jax.Array:
    return jnp.where(jnp.abs(x) <= threshold, 0, sign(x))


def _within(x: jax.Array, threshold: Any, bound: float) -> tuple[jax.Array]:
    return (jnp.abs(x) <= bound,)


_TERNARY = Step("SteTern", _ternary, where_kept, _within)
_TERNARY_PASSING = Step("SteTern", _ternary, straight_through, keep_none)


class SteTern(nnx.Module):
    """The sign of what is large and 0 for what is small, arXiv:1605.04711.

    Args:
        threshold: values up to this magnitude become 0; "twn" for 0.7 times the mean magnitude of
            the array.
        clip_value: the gradient passes where |x| <= clip_value; None for everywhere.

    Raises:
        ValueError: the threshold is negative or another word, or the bound is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.SteTern("twn")(jnp.array([-2.0, 0.1, 0.0, 1.0]))
        Array([-1.,  0.,  0.,  1.], dtype=float32)
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
            return _TERNARY_PASSING(x, threshold)
        return _TERNARY(x, threshold, self.clip_value)
