"""NVFP4Linear: a linear layer whose products are of NVFP4 blocks, arXiv:2509.25149.

forward   y = Q(x) Q(W) + b
backward  dx = R(g) Q(W)^T,  dW = Q(H x)^T R(H g),  db = sum g
kept      W, and the codes of Q(H x): 9/16 bytes an element

Q rounds to the nearest, R at random, so that gradients are right on average, but for elements that
saturate (`nvfp4`). Blocks of x and g are 16 elements along the axis that a product sums over; those
of W are 16x16, so that forward and dx see the same weights. H is the random Hadamard transform of
16 rows, which spreads outliers and leaves the product as it is. `nvfp4` says how blocks are scaled,
`scaled_linear` how they are multiplied.

The paper keeps some layers of a model, its last ones, in higher precision: leave them out of
`convert`.
"""

from typing import Any, Literal

import jax
from flax import nnx

from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.replaced_matmul import adopt, operands, refuse_injected
from flax_customgrad.low_bit.microscaling.nvfp4 import NVFP4
from flax_customgrad.low_bit.microscaling.scaled_linear import (
    RESIDUALS,
    BlockScaledConfig,
    scaled_linear,
)
from flax_customgrad.numerics.argument_checks import check_word
from flax_customgrad.numerics.noise_stream import fork_stream
from flax_customgrad.numerics.products import MatmulConfig


class NVFP4Linear(Linear):
    """`Linear` with NVFP4 operands in its product and in those of its backward.

    Parameters, their names and initial values are those of `flax.nnx.Linear`. Every operand is
    quantized along the axis that its product sums over, the kernel in squares, from the array
    itself; `dtype` is that of the output. The arithmetic is emulated in float32. An infinite or
    NaN element of an operand makes all of it NaN. Its source is arXiv:2509.25149.

    Attributes:
        stochastic_rounding: whether gradients are rounded at random.
        hadamard: whether the operands of the kernel's gradient are rotated.
        residuals: what is kept of the input between the passes.
        rngs: the stream that each call draws from, or None.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.NVFP4Linear(64, 3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 64))).shape
        (2, 3)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        stochastic_rounding: bool = True,
        hadamard: bool = True,
        residuals: Literal["quantized", "original"] = "quantized",
        rng_collection: str = "noise",
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        """Makes the layer.

        Args:
            in_features: size of the last axis of the inputs.
            out_features: size of the last axis of the outputs.
            stochastic_rounding: whether gradients are rounded at random, with noise that each
                call draws anew.
            hadamard: whether the operands of the kernel's gradient are rotated.
            residuals: "quantized" keeps codes and scales of the input, "original" the input. The
                gradients are the same.
            rng_collection: the stream of `rngs` that noise is drawn from.
            rngs: random numbers for the parameters and for the noise.
            **linear: what else `nnx.Linear` takes: use_bias, dtype, param_dtype, kernel_init and
                so on.

        Raises:
            ValueError: `residuals` is another word; an operation such as `dot_general` is given,
                which this layer cannot call.
        """
        check_word("NVFP4Linear", "residuals", residuals, RESIDUALS)
        super().__init__(in_features, out_features, rngs=rngs, **linear)
        refuse_injected("NVFP4Linear", self)
        self._set(stochastic_rounding, hadamard, residuals, rng_collection, rngs)

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
        """Turns a linear layer into this one, in place.

        Args:
            layer: an `nnx.Linear` or a subclass.
            stochastic_rounding: as for the constructor.
            hadamard: as for the constructor.
            residuals: as for the constructor.
            rng_collection: as for the constructor.
            rngs: random numbers for the noise; by default `nnx.Rngs(0)`, and layers of one shape
                then draw the same. For a whole model hand one over:
                `rules={nnx.Linear: lambda layer: NVFP4Linear.from_layer(layer, rngs=rngs)}`.

        Raises:
            TypeError: it is another layer.
            ValueError: as for the constructor.
        """
        check_word("NVFP4Linear", "residuals", residuals, RESIDUALS)
        made = adopt(cls, layer, nnx.Linear)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        made._set(stochastic_rounding, hadamard, residuals, rng_collection, rngs)
        return made

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
        recipe = BlockScaledConfig(
            operands=NVFP4(),
            gradient=NVFP4(),
            squares=True,
            rotates=self.hadamard,
            residuals=self.residuals,
        )
        how = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        key = None if self.rngs is None else self.rngs()
        return scaled_linear(params, x, key, recipe, how)

    def _set(
        self,
        stochastic_rounding: bool,
        hadamard: bool,
        residuals: Any,
        rng_collection: str,
        rngs: nnx.Rngs,
    ) -> None:
        self.stochastic_rounding, self.hadamard = stochastic_rounding, hadamard
        self.residuals = residuals
        drawing = "NVFP4Linear: stochastic_rounding=True"
        self.rngs = nnx.data(
            fork_stream(drawing, rng_collection, rngs) if stochastic_rounding else None
        )
