"""NVFP4Linear: a linear layer whose products are of NVFP4 blocks.

    forward   y  = Q(x) Q(w) + b
    backward  dx = R(g) Q(w)^T
              dw = Q(H x)^T R(H g)
              db = sum g
    kept      w, and the codes of Q(H x): 9/16 bytes an element

That is the operation `scaled_linear`. Q rounds to the nearest, R at random, so that gradients are
right on average, but for elements that saturate. Blocks of x and g are 16 elements along the axis
that a product sums over; those of w are 16x16, so that forward and dx see the same weights. H is
the random Hadamard transform of 16 rows, which spreads outliers and leaves the product as it is.

Q(x) stands for elements and scales in the format `NVFP4`: a block has an 8-bit float for a scale,
and all of x one factor.

    factor   a / (448 6),  a = max |x| over the whole array
    scale    E4M3(b / 6 / factor) = E4M3(448 b / a),  b = max |x| over the block; at least 2^-9
    element  E2M1(x / factor / scale)
    value    element scale factor,  at most a

The factor brings the scales into the range of E4M3, and the scales bring the elements into that of
E2M1. x is divided by a power of two near a first, exactly; the quotients are rounded once, so that
ties of data in half precision are ties here. An infinite or NaN element makes everything NaN, by
way of the factor. Where a scale is rounded down, by up to 1/17, the largest elements of its block
saturate. A block whose largest element is below a 2^-18 comes out with few digits, or 0.

The paper keeps some layers of a model, its last ones, in higher precision: leave them out of
`convert`.

Source: arXiv:2509.25149
"""

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
from flax_customgrad.layers.stacked import Index, repeated, stack_axes
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
from flax_customgrad.low_bit.microscaling.small_floats import (
    E2M1,
    E4M3,
    decode_elements,
    encode_elements,
    octave,
    round_to,
)
from flax_customgrad.numerics.argument_checks import check_word
from flax_customgrad.numerics.noise_stream import fork_stream
from flax_customgrad.numerics.products import MatmulConfig
from flax_customgrad.numerics.scaling import quotient

_SMALLEST, _LARGEST = 2.0**-9, 448.0
# Elements times scales are at most 448 6 = 21 2^7. Values are below 2^12, whose power is divided
# out of them and put into the factor: neither overflows.
_POWER = 2.0**11
# A power of two whose inverse is a normal number of float32 too.
_NORMAL = 2.0**125


@dataclass(frozen=True)
class NVFP4(BlockFormat):
    """The format of NVIDIA's Blackwell."""

    element: Any = E2M1
    size: int = 16

    def quantize(
        self, x: jax.Array, axes: Sequence[int], noise: jax.Array | None = None
    ) -> ScaledBlocks:
        """Scales blocks and rounds them to elements."""
        largest = jnp.max(jnp.abs(x), initial=0)
        power = jnp.clip(octave(largest), 1 / _NORMAL, _NORMAL)
        a = jnp.where(largest == 0, 1, jnp.where(jnp.isfinite(largest), largest / power, jnp.nan))
        blocks = split_blocks(x / power, axes, self.size)
        b = jnp.max(jnp.abs(blocks), axes_in_blocks(axes), keepdims=True)
        scales = jnp.maximum(round_to(E4M3, quotient(_LARGEST * b, a)), _SMALLEST)
        random = None if noise is None else split_blocks(noise, axes, self.size)
        most = _LARGEST * float(jnp.finfo(E2M1).max)
        elements = round_to(E2M1, quotient(most * blocks, a * scales), random)
        return ScaledBlocks(elements, encode_elements(E4M3, scales), _POWER / most * a * power)

    def values(self, scaled: ScaledBlocks) -> jax.Array:
        """What elements and scales stand for, in blocks."""
        assert scaled.factor is not None
        scales = decode_elements(E4M3, scaled.scales, scaled.elements.dtype)
        return scaled.elements * (scales / _POWER) * scaled.factor


class NVFP4Linear(Linear, PackableKernel):
    """`Linear` with NVFP4 operands in its product and in those of its backward.

    Takes what `flax.nnx.Linear` takes, but no `dot_general` or `promote_dtype` of the user's own,
    and the arguments below. Parameters, their names and initial values are those of
    `flax.nnx.Linear`. Every operand is quantized along the axis that its product sums over, the
    kernel in squares, from the array itself; `dtype` is that of the output. The arithmetic is
    emulated in float32. An infinite or NaN element of an operand makes all of it NaN.

    Args:
        stochastic_rounding: whether gradients are rounded at random, with noise that each call
            draws anew from `rngs`.
        hadamard: whether the operands of the kernel's gradient are rotated.
        residuals: "quantized" keeps codes and scales of the input, "original" the input. The
            gradients are the same.
        rng_collection: the stream of `rngs` that noise is drawn from.

    Attributes:
        stochastic_rounding: whether gradients are rounded at random.
        hadamard: whether the operands of the kernel's gradient are rotated.
        residuals: what is kept of the input between the passes.
        rngs: the stream that each call draws from, or None.

    Raises:
        ValueError: `residuals` is neither word; `dot_general` or `promote_dtype` is the user's own,
            which this layer cannot call.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.NVFP4Linear(64, 3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 64))).shape
        (2, 3)

    Source: arXiv:2509.25149
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
        stochastic_rounding: bool = True,
        hadamard: bool = True,
        residuals: Literal["quantized", "original"] = "quantized",
        rng_collection: str = "noise",
    ):
        check_word("NVFP4Linear", "residuals", residuals, RESIDUALS)
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
        refuse_injected("NVFP4Linear", self)
        self._set_rounding(stochastic_rounding, hadamard, residuals, rng_collection, rngs)

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Linear,
        *,
        stochastic_rounding: bool = True,
        hadamard: bool = True,
        residuals: Literal["quantized", "original"] = "quantized",
        rng_collection: str = "noise",
        rngs: nnx.Rngs | None = None,
    ) -> "NVFP4Linear":
        """Turns a linear layer into one whose products are of NVFP4 blocks, in place.

        `layer` itself changes and is returned: pass `nnx.clone(layer)` to keep the original.

        Args:
            layer: an `nnx.Linear` or a subclass.
            stochastic_rounding: as for the constructor.
            hadamard: as for the constructor.
            residuals: as for the constructor.
            rng_collection: as for the constructor.
            rngs: random numbers for the noise; by default `nnx.Rngs(0)`, and layers of one shape
                then draw the same. For a whole model hand one over:
                `rules={nnx.Linear: lambda layer: NVFP4Linear.from_layer(layer, rngs=rngs)}`.

        Returns:
            `layer`, which is now of this class.

        Raises:
            TypeError: the layer is no `nnx.Linear`, or computes something else.
            ValueError: as for the constructor.
        """
        check_word("NVFP4Linear", "residuals", residuals, RESIDUALS)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        with adopted(cls, layer, nnx.Linear) as nvfp4:
            nvfp4._set_rounding(stochastic_rounding, hadamard, residuals, rng_collection, rngs)
        return nvfp4

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
        key = None if self.rngs is None or self.deterministic else self.rngs()
        return scaled_linear(params, x, key, config, matmul)

    @property
    def _config(self) -> BlockScaledConfig:
        return BlockScaledConfig(
            operands=NVFP4(),
            gradient=NVFP4(),
            squares=True,
            rotates=self.hadamard,
            residuals=self.residuals,
            packed=self.is_packed,
        )

    def _pack_one(self, index: Index) -> BlockKernel:
        config = self._config
        return BlockKernel(
            self.kernel[index], self.kernel, config.operands, config.kernel_axes(axis=0)
        )

    def _set_rounding(
        self,
        stochastic_rounding: bool,
        hadamard: bool,
        residuals: Any,
        rng_collection: str,
        rngs: nnx.Rngs,
    ) -> None:
        self.stochastic_rounding, self.hadamard = stochastic_rounding, hadamard
        self.residuals = residuals
        self.deterministic = False
        self.rngs = nnx.data(None)
        if stochastic_rounding:
            drawing = "NVFP4Linear: stochastic_rounding=True"
            self.rngs = repeated(fork_stream(drawing, rng_collection, rngs), stack_axes(self))
