"""Ternary weights: -1, 0 or 1, times the size of the weights.

    forward   TWN      y = a sign(w) where |w| > d, else 0         arXiv:1605.04711
                       d = 0.7 mean |w|,  a = mean of |w| where |w| > d
              AbsMean  y = a clip(round(w / a), -1, 1)             BitNet b1.58, arXiv:2402.17764
                       a = mean |w|
    backward  dw = g, or g where |w| <= clip_value
    kept      nothing, or a bit an element

Scale and threshold are constants to the gradient. |w| = d is 0; so is |w| = a / 2 for AbsMean,
which rounds halves to the even integer: its threshold is 0.5 mean |w|, not 0.7. The bound is
inclusive.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.low_bit.quantizers.calibration import (
    Axis,
    granularity_of,
    mean_magnitude,
    mean_where,
)
from flax_customgrad.low_bit.quantizers.codes import Codes, to_codes
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.low_bit.quantizers.scheme import ClippedGradientScheme
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_clip_value, check_positive
from flax_customgrad.numerics.scaling import quotient
from flax_customgrad.numerics.sharding import AxisName


@dataclass(frozen=True)
class TWNScheme(ClippedGradientScheme):
    """-a, 0 and a; the parameters are a and the threshold d."""

    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The sign of weights beyond the threshold, 0 for the others."""
        return jnp.where(jnp.abs(x) > parameters[1], jnp.sign(x), 0)

    def decode(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The integers times a."""
        return q * parameters[0]

    def step(self, *parameters: jax.Array) -> jax.Array | None:
        """`a`."""
        return parameters[0]

    def zero_point(self, *parameters: jax.Array) -> jax.Array | int | None:
        """0."""
        return 0


@dataclass(frozen=True)
class AbsMeanScheme(TWNScheme):
    """-a, 0 and a, whichever is nearest; a is the parameter."""

    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The nearest of -1, 0 and 1 to x / a."""
        return jnp.clip(jnp.round(quotient(x, parameters[0])), self.low, self.high)


class TWN(Quantizer):
    """The weights of ternary weight networks: large ones keep their sign, small ones become 0.

    Args:
        threshold: in units of the mean magnitude: weights up to it become 0.
        axis: the axes along which each index has a mean of its own; None for one, as in the paper.
        clip_value: the gradient passes where |w| <= clip_value; None, as in the paper, for
            everywhere.
        axis_name: the axis of a `shard_map`, `pmap` or `vmap` over which weights are parts of one
            array, with one mean for all parts; None where each array is whole.

    Raises:
        ValueError: `threshold` or `clip_value` is not positive.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.TWN()(jnp.array([-2.0, 0.1, 0.0, 1.0]))
        Array([-1.5,  0. ,  0. ,  1.5], dtype=float32)

    Source: arXiv:1605.04711
    """

    def __init__(
        self,
        threshold: float = 0.7,
        *,
        axis: Axis = None,
        clip_value: float | None = None,
        axis_name: AxisName = None,
    ):
        self.threshold = check_positive("TWN", "threshold", threshold)
        self.granularity = granularity_of("TWN", axis, axis_name=axis_name)
        self.clip_value = check_clip_value("TWN", clip_value)

    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes weights; returns the values and their codes.

        Args:
            x: array of any shape, float.
        """
        x = jnp.asarray(x)
        size = jnp.abs(lax.stop_gradient(x).astype(accumulator(x)))
        threshold = self.threshold * mean_magnitude(x, self.granularity)
        # NaN is beyond no threshold, and must not leave the scale finite.
        scale = mean_where(size, ~(size <= threshold), self.granularity)
        return to_codes(x, (scale, threshold), TWNScheme(-1, 1, self.clip_value))


class AbsMean(Quantizer):
    """The ternary weights of BitNet b1.58, in units of their mean magnitude.

    Args:
        axis: the axes along which each index has a mean of its own; None for one, as in the paper.
        clip_value: the gradient passes where |w| <= clip_value; None, as in the paper, for
            everywhere.
        axis_name: the axis of a `shard_map`, `pmap` or `vmap` over which weights are parts of one
            array, with one mean for all parts; None where each array is whole.

    Raises:
        ValueError: `clip_value` is not positive.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> codes = fcg.AbsMean().quantize(jnp.array([-2.0, 0.5, 0.25, 0.75]))
        >>> codes.values, codes.codes
        (Array([-0.875,  0.875,  0.   ,  0.875], dtype=float32), Array([0, 2, 1, 2], dtype=uint8))

    Source: arXiv:2402.17764
    """

    def __init__(
        self,
        *,
        axis: Axis = None,
        clip_value: float | None = None,
        axis_name: AxisName = None,
    ):
        self.granularity = granularity_of("AbsMean", axis, axis_name=axis_name)
        self.clip_value = check_clip_value("AbsMean", clip_value)

    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes weights; returns the values and their codes.

        Args:
            x: array of any shape, float.
        """
        x = jnp.asarray(x)
        scale = mean_magnitude(x, self.granularity)
        scale = jnp.where(scale == 0, 1, scale)
        return to_codes(x, (scale,), AbsMeanScheme(-1, 1, self.clip_value))
