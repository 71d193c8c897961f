"""SteHeaviside: the unit step, with a gradient near it.

    forward   y  = 1 where x > 0, else 0
    backward  dx = g where |x| <= clip_value, or g everywhere
    kept      a mask, one byte an element, or nothing

The bound is inclusive, and the step of NaN is NaN.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.estimators.rounding.step import Step, keep_none, keep_within, straight_through
from flax_customgrad.numerics.argument_checks import check_clip_value
from flax_customgrad.numerics.packing import masked


def heaviside(x: jax.Array, *parameters: object) -> jax.Array:
    """1 where x > 0 and 0 elsewhere, whatever parameters a backward has; NaN stays NaN."""
    return jnp.where(x > 0, 1, jnp.where(x <= 0, 0, x))


_HEAVISIDE = Step("SteHeaviside", heaviside, masked, keep_within)
_HEAVISIDE_STRAIGHT_THROUGH = Step("SteHeaviside", heaviside, straight_through, keep_none)


class SteHeaviside(nnx.Module):
    """The unit step, whose gradient passes where |x| <= clip_value.

    Args:
        clip_value: the bound, inclusive; None for a gradient that passes everywhere.

    Raises:
        ValueError: `clip_value` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> x = jnp.array([-2.0, 0.0, 0.5])
        >>> fcg.SteHeaviside()(x)
        Array([0., 0., 1.], dtype=float32)
        >>> jax.grad(lambda x: fcg.SteHeaviside()(x).sum())(x)
        Array([0., 1., 1.], dtype=float32)

    Source: arXiv:1602.02830
    """

    def __init__(self, clip_value: float | None = 1.0):
        self.clip_value = check_clip_value("SteHeaviside", clip_value)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The step of each element.

        Args:
            x: array of any shape.

        Returns:
            Array like x, of 0 and 1.
        """
        return (
            _HEAVISIDE_STRAIGHT_THROUGH(x)
            if self.clip_value is None
            else _HEAVISIDE(x, self.clip_value)
        )
