"""LSQ: integers in units of a scale that is learned, arXiv:1902.08153.

    forward   y  = s clip(round(v), low, high),   v = x / s,   s = max(|p|, least)
    backward  dx = g where low <= v <= high, else 0
              ds = G sum of g {round(v) - v inside, low, high},   dp = sign(p) ds
              G  = 1 / sqrt(N high)
    kept      x and p

Straight-through, round(v) has the slope 1, and clip its own:

    ∂y/∂x = s ∂round(v)/∂v ∂v/∂x = s / s = 1                          inside
    ∂y/∂s = round(v) + s ∂v/∂s = round(v) - s x / s^2 = round(v) - v  inside
    y     = s low or s high:  ∂y/∂x = 0,  ∂y/∂s = low or high         outside

The parameter p is the scale. One that an optimizer drives to zero or below is used by its
magnitude, at 0 by the least normal number, with the gradient that p has from above: it can grow
again on either side. The ends of the range are inside of it. The integers are -2^(bits-1) to
2^(bits-1) - 1, or 0 to 2^bits - 1; torch and Brevitas test whether the rounded v is in the range,
this whether v is.

N is the number of weights that share a scale; of activations it is the number of features, and
examples are not counted, so that a gradient is the same for a batch and for its parts.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.contract.ordering import wait_for
from flax_customgrad.low_bit.quantizers.calibration import Axis, granularity_of, mean_where
from flax_customgrad.low_bit.quantizers.codes import Codes, to_codes
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.low_bit.quantizers.scheme import Scheme, integer_range
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.argument_checks import check_bits, check_size
from flax_customgrad.numerics.broadcasting import broadcasts, sum_to_shape
from flax_customgrad.numerics.scaling import abs_floor, abs_floor_slope, quotient
from flax_customgrad.numerics.sizes import is_known


@dataclass(frozen=True)
class LSQScheme(Scheme):
    """Integers in units of the scale s; p is the parameter.

    Attributes:
        grad_scale: what the scale's gradient is multiplied by; None for 1 / sqrt(N high).
        features: how many of the last axes N is counted over; None for all of them.
    """

    grad_scale: float | None
    features: int | None

    def scale(self, p: jax.Array) -> jax.Array:
        """`s`, from the parameter p."""
        return abs_floor(p)

    def scale_slope(self, p: jax.Array) -> jax.Array:
        """The derivative of `s` with respect to p."""
        return abs_floor_slope(p)

    def encode(self, x: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The nearest integer to x / s in [low, high]."""
        return jnp.clip(jnp.round(quotient(x, self.scale(parameters[0]))), self.low, self.high)

    def decode(self, q: jax.Array, *parameters: jax.Array) -> jax.Array:
        """The integers times s."""
        return q * self.scale(parameters[0])

    def step(self, *parameters: jax.Array) -> jax.Array | None:
        """`s`."""
        return self.scale(parameters[0])

    def zero_point(self, *parameters: jax.Array) -> jax.Array | int | None:
        """0."""
        return 0

    def keep(self, x: jax.Array, *parameters: jax.Array) -> tuple[jax.Array, ...]:
        """`x` and the parameters."""
        return x, *parameters

    def cotangents(self, g: jax.Array, *kept: jax.Array) -> tuple[Any, ...]:
        """The cotangents of x and p."""
        g, (x, p) = wait_for(g, kept)
        v = quotient(x, self.scale(p))
        inside = (v >= self.low) & (v <= self.high)
        slope = jnp.where(inside, jnp.round(v) - v, jnp.clip(v, self.low, self.high))
        # Where round passes a gradient on, as here, the slope has no derivative.
        ds = self.gain(x.shape, p) * sum_to_shape(g * lax.stop_gradient(slope), p.shape)
        return jnp.where(inside, g, 0), self.scale_slope(p) * ds

    def gain(self, shape: tuple[int, ...], p: jax.Array) -> Any:
        """`G`, for an array of some shape."""
        if self.grad_scale is not None:
            return self.grad_scale
        counted = shape if self.features is None else shape[max(len(shape) - self.features, 0) :]
        n = math.prod(counted)
        if not is_known(n):
            return lax.rsqrt(jnp.maximum(n / p.size, 1) * self.high).astype(p.dtype)
        return 1 / math.sqrt(max(n / p.size, 1) * self.high)


class LSQ(Quantizer):
    """Learned step size quantization: a scale that trains with the weights.

    For activations give `features`, so that the gradient of the scale does not depend on how many
    examples there are.

    Attributes:
        scale: the learned scale, or scales; float32. `observe` sets it to 2 mean |x| / sqrt(high).
            Until then it is that of a unit normal distribution; with an axis it is empty.

    Args:
        bits: from 2 to 16.
        signed: whether the integers are -2^(bits-1) to 2^(bits-1) - 1, or 0 to 2^bits - 1, such as
            for what comes from a relu.
        axis: the axes along which each index has a scale of its own, such as -1 for the output
            channels of a kernel; None for one scale.
        features: how many of the last axes are the features of an activation: 1, or 3 for images.
            None for weights, where every element counts.
        grad_scale: what the scale's gradient is multiplied by: "lsq" for 1 / sqrt(N high), or a
            number.

    Raises:
        ValueError: `bits` is not from 2 to 16, `axis` is "token", `features` is not a positive
            integer, or `grad_scale` is a word other than "lsq".

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> quantizer = fcg.LSQ(bits=2)
        >>> quantizer.observe(jnp.array([0.5, -0.25, 0.0, 1.25]))
        >>> quantizer.scale[...]
        Array(1., dtype=float32)
        >>> quantizer(jnp.array([-3.0, -0.4, 0.6, 1.2]))
        Array([-2., -0.,  1.,  1.], dtype=float32)
        >>> nnx.grad(lambda q: q(jnp.array([-3.0, -0.4, 0.6, 1.2])).sum())(quantizer).scale[...]
        Array(-0.1..., dtype=float32)

    Source: arXiv:1902.08153
    """

    def __init__(
        self,
        bits: int = 8,
        *,
        signed: bool = True,
        axis: Axis = None,
        features: int | None = None,
        grad_scale: Literal["lsq"] | float = "lsq",
    ):
        name = type(self).__name__
        self.bits, self.signed = check_bits(name, bits, most=16), signed
        if axis == "token":
            raise ValueError(f'{name}: axis="token" has no scales to learn: give axes, or None')
        if isinstance(grad_scale, str) and grad_scale != "lsq":
            raise ValueError(f'{name}: grad_scale={grad_scale!r} must be "lsq" or a number')
        self.granularity = granularity_of(name, axis)
        self.features = None if features is None else check_size(name, "features", features)
        self.grad_scale = grad_scale
        # Of a unit normal distribution, whose mean magnitude is sqrt(2 / pi).
        normal = 2 * math.sqrt(2 / math.pi / self.integers[1])
        # How many channels there are is not known yet.
        self.scale = nnx.Param(jnp.full(() if axis is None else (0,), normal))

    @property
    def integers(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return integer_range(self.bits, self.signed)

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The sizes of the axes along which `nnx.vmap` has stacked quantizers; () for one."""
        return self.granularity.stack_axes(self.scale.shape)

    def quantize(self, x: jax.Array) -> Codes:
        """Quantizes an array; returns the values and their codes.

        Args:
            x: array of any shape, float.

        Raises:
            ValueError: the scales have not been set yet, or do not fit the shape of x.
        """
        x = jnp.asarray(x)
        return to_codes(x, (learned_parameter(self, "scale", x),), self._scheme(LSQScheme))

    def observe(self, x: jax.Array) -> None:
        """Sets the scale to 2 mean |x| / sqrt(high), 1 for zeros; what is not finite is left out.

        Args:
            x: array of any shape, float, like those to come.
        """
        magnitudes = jnp.abs(lax.stop_gradient(x).astype(accumulator(x)))
        mean = mean_where(magnitudes, jnp.isfinite(magnitudes), self.granularity)
        scale = mean * (2 / math.sqrt(self.integers[1]))
        set_learned_parameter(self, "scale", jnp.where(scale > 0, scale, 1))

    def _scheme(self, kind: type[LSQScheme]) -> LSQScheme:
        grad_scale = None if isinstance(self.grad_scale, str) else self.grad_scale
        return kind(*self.integers, grad_scale, self.features)


def learned_parameter(quantizer: LSQ, name: str, x: jax.Array) -> jax.Array:
    """The value of a learned parameter, checked against the array to quantize.

    Args:
        quantizer: the quantizer that has the parameter.
        name: the name of the parameter.
        x: the array to quantize, of any shape, float.

    Raises:
        ValueError: the parameter has not been set, or does not fit the shape of x.
    """
    parameter = getattr(quantizer, name)
    layer = type(quantizer).__name__
    if not parameter.size:
        raise ValueError(
            f"{layer}: axis={quantizer.granularity.axis} has as many scales as there are channels: "
            "call observe(x) first, with an array like those to come"
        )
    if not broadcasts(parameter.shape, x.shape):
        raise ValueError(
            f"{layer}: `{name}` has shape {parameter.shape}, which does not fit an input of shape "
            f"{x.shape}: call observe(x) with an array like those to come"
        )
    return parameter[...]


def set_learned_parameter(quantizer: LSQ, name: str, value: jax.Array) -> None:
    """Sets a learned parameter; the first array says how many channels there are.

    Args:
        quantizer: the quantizer that has the parameter.
        name: the name of the parameter.
        value: float array, with size 1 along the axes that share a value, as from `calibration`.
    """
    granularity, parameter = quantizer.granularity, getattr(quantizer, name)
    value = value.reshape(()) if granularity.axis is None else granularity.for_any_rank(value)
    parameter.set_value(value.astype(parameter.dtype))
