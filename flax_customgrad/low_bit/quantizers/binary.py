"""Binary weights and activations: a sign, of one bit.

    forward   y  = a sign(x),  a = mean |x| over the n weights of a channel, or 1
    backward  BinaryActivation         dx = g where |x| <= clip_value               arXiv:1602.02830
              BinaryWeight  "bi_real"  dx = a g where |x| <= clip_value             arXiv:1808.00278
                            "xnor"     dx = a g where |x| <= clip_value,  + g / n   arXiv:1603.05279
    kept      a bit an element, nothing without a bound; and a

The bound is inclusive, and 0 has the sign 1. For "bi_real" a is a constant; "xnor" has XNOR-Net's
gradient, in which each weight's share of the mean scales its own sign alone. `SteSign`,
`MagnitudeAwareSign` and `XNORSign` have the same gradients, and no codes for a layer to keep.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.low_bit.quantizers.calibration import Axis, granularity_of, mean_magnitude
from flax_customgrad.low_bit.quantizers.codes import Codes, to_codes
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.low_bit.quantizers.scheme import ClippedGradientScheme
from flax_customgrad.numerics.argument_checks import check_clip_value
from flax_customgrad.numerics.sharding import AxisName


@dataclass(frozen=True)
class SignScheme(ClippedGradientScheme):
    """-1 and 1, the codes 0 and 1; without parameters."""

    def encode(self, x: jax.Array, *a: jax.Array) -> jax.Array:
        """Whether x >= 0."""
        return (x >= 0).astype(x.dtype)

    def decode(self, q: jax.Array, *a: jax.Array) -> jax.Array:
        """-1 for 0, 1 for 1."""
        return 2 * q - 1


@dataclass(frozen=True)
class ScaledSignScheme(SignScheme):
    """-a and a, the codes 0 and 1; a is the parameter.

    Attributes:
        share: 1 / n, the share of a weight in the mean; 0 where a is a constant.
    """

    share: float

    def decode(self, q: jax.Array, *a: jax.Array) -> jax.Array:
        """-a for 0, a for 1."""
        return super().decode(q) * a[0]

    def keep(self, x: jax.Array, *a: jax.Array) -> tuple[jax.Array, ...]:
        """`a`, and which elements lie within the bound."""
        return *a, *super().keep(x)

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[Any, ...]:
        """`a g` within the bound, plus the share of the mean."""
        a, *mask = kept
        (dx,) = super().cotangents(a * g, *mask)
        return (dx + self.share * g if self.share else dx,)


class BinaryActivation(Quantizer):
    """The sign of activations, in one bit, whose gradient passes near 0.

    Args:
        clip_value: the gradient passes where |x| <= clip_value; None for everywhere.

    Raises:
        ValueError: `clip_value` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> x = jnp.array([-2.0, -0.5, 0.0, 1.0])
        >>> fcg.BinaryActivation().quantize(x).codes
        Array([0, 0, 1, 1], dtype=uint8)
        >>> jax.grad(lambda x: fcg.BinaryActivation()(x).sum())(x)
        Array([0., 1., 1., 1.], dtype=float32)

    Source: arXiv:1602.02830
    """

    def __init__(self, clip_value: float | None = 1.0):
        self.clip_value = check_clip_value("BinaryActivation", clip_value)

    def quantize(self, x: jax.Array) -> Codes:
        """The sign of each element, and its code: 0 or 1.

        Args:
            x: array of any shape, float.
        """
        return to_codes(jnp.asarray(x), (), SignScheme(0, 1, self.clip_value))


class BinaryWeight(Quantizer):
    """The sign of weights times the mean magnitude of their channel, in one bit.

    Args:
        axis: the axes along which each index has a mean of its own: the output channels, last in
            a kernel of flax.nnx. None for one mean.
        scaled: whether there is a scale; without one the values are 1 and -1.
        clip_value: the gradient passes where |w| <= clip_value; None for everywhere.
        axis_name: the axis of a `shard_map`, `pmap` or `vmap` over which weights are parts of one
            array, with one mean for all parts; None where each array is whole.
        gradient: "bi_real" treats the scale as a constant, arXiv:1808.00278; "xnor" adds the
            gradient of the mean as XNOR-Net has it, arXiv:1603.05279.

    Raises:
        ValueError: `clip_value` is not positive, `gradient` is neither "bi_real" nor "xnor", or
            `gradient` is "xnor" and `scaled` is False.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> w = jnp.array([[0.5, -2.0], [-0.25, 0.0]])
        >>> fcg.BinaryWeight()(w)
        Array([[ 0.375, -1.   ],
               [-0.375,  1.   ]], dtype=float32)
        >>> jax.grad(lambda w: fcg.BinaryWeight()(w).sum())(w)
        Array([[0.375, 0.   ],
               [0.375, 1.   ]], dtype=float32)

    Source: arXiv:1808.00278, arXiv:1603.05279
    """

    def __init__(
        self,
        *,
        axis: Axis = -1,
        scaled: bool = True,
        clip_value: float | None = 1.0,
        axis_name: AxisName = None,
        gradient: Literal["bi_real", "xnor"] = "bi_real",
    ):
        if gradient not in ("bi_real", "xnor"):
            raise ValueError(f'BinaryWeight: gradient={gradient!r} must be "bi_real" or "xnor"')
        if gradient == "xnor" and not scaled:
            raise ValueError(
                'BinaryWeight: gradient="xnor" is that of the scale: leave out scaled=False'
            )
        self.granularity = granularity_of("BinaryWeight", axis, axis_name=axis_name)
        self.scaled = scaled
        self.clip_value = check_clip_value("BinaryWeight", clip_value)
        self.gradient = gradient

    def quantize(self, x: jax.Array) -> Codes:
        """The sign of each weight times its scale, and its code: 0 or 1.

        Args:
            x: array of any shape, float.
        """
        x = jnp.asarray(x)
        if not self.scaled:
            return to_codes(x, (), SignScheme(0, 1, self.clip_value))
        scale = mean_magnitude(x, self.granularity)
        share = scale.size / max(x.size, 1) if self.gradient == "xnor" else 0.0
        if self.granularity.axis_name is not None:
            share /= lax.axis_size(self.granularity.axis_name)
        return to_codes(x, (scale,), ScaledSignScheme(0, 1, self.clip_value, share))
