"""MXLinear: a linear layer whose products are of MX blocks.

    forward   y  = Q(x) Q(w) + b
    backward  dx = Q(g) Q(w)^T
              dw = Q(x)^T Q(g)
              db = sum g
    kept      w, and the codes of Q(x) along the rows: 33/32 bytes an element with MXFP8, 17/32
              with MXFP4

That is the operation `scaled_linear`. Q(x) stands for elements and scales in the format `MX`:
blocks of `block` elements, along the axis that a product sums over, which for dw is the rows, share
a power of two.

    scale    2^e,  a = max |x| over the block,  c = the largest element
             up:    e = ceil(log2(a / c)),  so that nothing saturates
             down:  e = floor(log2 a) - floor(log2 c),  of the OCP specification 1.0; what lies
                    beyond c 2^e saturates: up to an eighth of E4M3's values, a quarter of E2M1's
    bounds   -126 <= e <= 127 - floor(log2 c)
    code     e + 127, E8M0; 255 for NaN
    element  x 2^-e, rounded

A block with an element that is infinite or NaN is NaN throughout. e is taken from the bits of a, so
that it is right beside powers of two as well, where a quotient's logarithm is not. Its bounds keep
scales and values normal, finite numbers of float32: values beyond saturate, and zeros have the
lowest scale. (The specification has 2^-127 too, which XLA takes for 0.)

Rounding up is what NVIDIA's TransformerEngine does (arXiv:2506.08027). Products of normal data are
28.5 dB above their error with E4M3 and scales rounded up, 27.4 dB rounded down; 16.2 and 16.0 dB
with E2M1. qwix rounds another exponent; its codes are not those of the specification.

Source: arXiv:2310.10537
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import lax

from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.packed_weights import PackableKernel
from flax_customgrad.layers.replaced_matmul import adopted, operands, refuse_injected
from flax_customgrad.layers.stacked import Index
from flax_customgrad.low_bit.microscaling.block_kernel import BlockKernel
from flax_customgrad.low_bit.microscaling.scaled_blocks import (
    BlockFormat,
    ScaledBlocks,
    axes_in_blocks,
    split_blocks,
)
from flax_customgrad.low_bit.microscaling.scaled_linear import (
    RESIDUALS,
    BlockScaledConfig,
    scaled_linear,
)
from flax_customgrad.low_bit.microscaling.small_floats import E2M1, E4M3, E5M2, octave, round_to
from flax_customgrad.numerics.argument_checks import check_word
from flax_customgrad.numerics.products import MatmulConfig

_FORMATS = {"mxfp8": E4M3, "mxfp4": E2M1}
_GRADIENTS = {"e4m3": E4M3, "e5m2": E5M2, "e2m1": E2M1}
_BIAS, _NAN, _LOWEST = 127, 255, -126
_MANTISSA = jnp.finfo(jnp.float32).nmant


@dataclass(frozen=True)
class MX(BlockFormat):
    """A format of the OCP specification.

    Attributes:
        element: the format of the elements.
        size: how many elements along an axis share a scale.
        up: whether the exponent of the scale is rounded up.
    """

    up: bool = True

    def quantize(
        self, x: jax.Array, axes: Sequence[int], noise: jax.Array | None = None
    ) -> ScaledBlocks:
        """Scales blocks and rounds them to elements."""
        blocks = split_blocks(x, axes, self.size)
        e, finite = self._exponent(blocks, axes_in_blocks(axes))
        random = None if noise is None else split_blocks(noise, axes, self.size)
        elements = round_to(self.element, blocks * _power(-e, x.dtype), random)
        scales = jnp.where(finite, e + _BIAS, _NAN).astype(jnp.uint8)
        return ScaledBlocks(elements, scales)

    def values(self, scaled: ScaledBlocks) -> jax.Array:
        """What elements and scales stand for, in blocks."""
        power = _power(scaled.scales.astype(jnp.int32) - _BIAS, scaled.elements.dtype)
        return scaled.elements * jnp.where(scaled.scales == _NAN, jnp.nan, power)

    @property
    def _largest(self) -> tuple[float, int]:
        """The largest element, c, as its fraction in [1, 2) and floor(log2 c)."""
        fraction, exponent = math.frexp(float(jnp.finfo(self.element).max))
        return 2 * fraction, exponent - 1

    def _exponent(self, blocks: jax.Array, along: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """The exponent of each scale, int32, and whether its block is finite."""
        a = jnp.max(jnp.abs(blocks), along, keepdims=True)
        fraction, log2_c = self._largest
        below = jnp.clip(octave(a), 2.0 ** (log2_c + _LOWEST), 2.0**_BIAS)
        e = _exponent(below) - log2_c
        if self.up:
            e += a > fraction * below
        return jnp.minimum(e, _BIAS - log2_c), jnp.isfinite(a)


def _power(exponent: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """2^exponent, exactly; from -126 to 127."""
    bits = (exponent + _BIAS).astype(jnp.uint32) << _MANTISSA
    return lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def _exponent(power: jax.Array) -> jax.Array:
    """What `_power` was called with, int32."""
    bits = lax.bitcast_convert_type(power.astype(jnp.float32), jnp.int32)
    return (bits >> _MANTISSA) - _BIAS


class MXLinear(Linear, PackableKernel):
    """`Linear` with MXFP8 or MXFP4 operands in its product and in those of its backward.

    Takes what `flax.nnx.Linear` takes, but no `dot_general` or `promote_dtype` of the user's own,
    and the arguments below. Parameters, their names and initial values are those of
    `flax.nnx.Linear`. Every operand is quantized along the axis that its product sums over, from
    the array itself; `dtype` is that of the output. The arithmetic is emulated in float32, with the
    codes that the OCP specification defines. An infinite or NaN element makes its block NaN. Of a
    packed layer the gradient of the input is that of the packed weights, rounded along the outputs.

    Args:
        format: of inputs and kernel: "mxfp8", elements of E4M3, or "mxfp4", of E2M1.
        gradient: elements of the output's gradient: "e4m3", "e5m2" with 2 bits of mantissa and a
            wider range in a block, or "e2m1" of 4 bits.
        block: how many elements share a scale; 32 in the specification. The last block of an axis
            is shorter where it does not divide its size.
        scale: "up" rounds the exponent of a scale so that nothing saturates, as NVIDIA's
            TransformerEngine does; "down" as the specification does.
        residuals: "quantized" keeps codes and scales of the input, "original" the input. The
            gradients are the same.

    Attributes:
        format: of inputs and kernel.
        gradient: format of the elements of gradients.
        block: how many elements share a scale.
        scale: how the exponent of a scale is rounded.
        residuals: what is kept of the input between the passes.

    Raises:
        ValueError: an argument is none of the words above; `block` is below 1; `dot_general` or
            `promote_dtype` is the user's own, which this layer cannot call.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.MXLinear(64, 3, format="mxfp4", rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 64))).shape
        (2, 3)

    Source: arXiv:2310.10537
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        dot_general: Any = lax.dot_general,
        promote_dtype: Any = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        format: Literal["mxfp8", "mxfp4"] = "mxfp8",
        gradient: Literal["e4m3", "e5m2", "e2m1"] = "e4m3",
        block: int = 32,
        scale: Literal["up", "down"] = "up",
        residuals: Literal["quantized", "original"] = "quantized",
    ):
        _check("MXLinear", format, gradient, block, scale, residuals)
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dot_general=dot_general,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        refuse_injected("MXLinear", self)
        self._set_format(format, gradient, block, scale, residuals)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Linear,
        *,
        format: Literal["mxfp8", "mxfp4"] = "mxfp8",
        gradient: Literal["e4m3", "e5m2", "e2m1"] = "e4m3",
        block: int = 32,
        scale: Literal["up", "down"] = "up",
        residuals: Literal["quantized", "original"] = "quantized",
    ) -> "MXLinear":
        """Turns a linear layer into one whose products are of MX blocks, in place.

        `layer` itself changes and is returned: pass `nnx.clone(layer)` to keep the original.

        Args:
            layer: an `nnx.Linear` or a subclass.
            format: as for the constructor.
            gradient: as for the constructor.
            block: as for the constructor.
            scale: as for the constructor.
            residuals: as for the constructor.

        Returns:
            `layer`, which is now of this class.

        Raises:
            TypeError: the layer is no `nnx.Linear`, or computes something else.
            ValueError: as for the constructor.
        """
        _check("MXLinear", format, gradient, block, scale, residuals)
        with adopted(cls, layer, nnx.Linear) as mx:
            mx._set_format(format, gradient, block, scale, residuals)
        return mx

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features), float.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.

        Raises:
            TypeError: the inputs are no real floating array.
        """
        params, x = operands(self, inputs, "kernel", "bias")
        config = self._config
        matmul = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return scaled_linear(params, x, None, config, matmul)

    @property
    def _config(self) -> BlockScaledConfig:
        up = self.scale == "up"
        return BlockScaledConfig(
            operands=MX(_FORMATS[self.format], self.block, up),
            gradient=MX(_GRADIENTS[self.gradient], self.block, up),
            residuals=self.residuals,
            packed=self.is_packed,
        )

    def _pack_one(self, index: Index) -> BlockKernel:
        config = self._config
        return BlockKernel(
            self.kernel[index], self.kernel, config.operands, config.kernel_axes(axis=0)
        )

    def _set_format(
        self, format: Any, gradient: Any, block: int, scale: Any, residuals: Any
    ) -> None:
        self.format, self.gradient, self.block = format, gradient, block
        self.scale, self.residuals = scale, residuals


def _check(name: str, format: Any, gradient: Any, block: Any, scale: Any, residuals: Any) -> None:
    check_word(name, "format", format, _FORMATS)
    check_word(name, "gradient", gradient, _GRADIENTS)
    check_word(name, "scale", scale, ("up", "down"))
    check_word(name, "residuals", residuals, RESIDUALS)
    if operator.index(block) < 1:
        raise ValueError(f"{name}: block={block!r} must be 1 or more")
