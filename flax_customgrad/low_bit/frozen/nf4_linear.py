"""NF4Linear: a linear layer with a frozen kernel in 4-bit NormalFloat, arXiv:2305.14314.

How it computes is on the page `frozen_linear`, how the kernel is stored on the page `nf4`.
"""

from typing import Any

from flax import nnx

from flax_customgrad.low_bit.frozen.frozen_linear import FrozenLinear
from flax_customgrad.low_bit.frozen.kernel_blocks import checked_block
from flax_customgrad.low_bit.frozen.nf4 import NF4


class NF4Linear(FrozenLinear):
    """A linear layer whose kernel is frozen: 16 levels of 4 bits, one scale to a block of weights.

    It keeps codes between the passes, and no input, and dequantizes in the forward and again in
    the backward. It is no `nnx.Linear`, for it has no kernel that could be trained: code that
    looks for one by type finds none. Its source is arXiv:2305.14314.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        block: how many weights of an output share a scale, along the inputs. The last block is
            shorter where it does not divide in_features.
        double_quant: whether the scales are stored in 8 bits, in groups of 256 outputs.
        train_bias: whether the bias is an `nnx.Param`; by default it is `Frozen` as well.
        rngs: random number generators; the kernel is that of `nnx.Linear`, quantized.
        **linear: what else `nnx.Linear` takes: use_bias, dtype, param_dtype, kernel_init and so
            on. `kernel_metadata` is that of the codes.

    Attributes:
        codes: `Frozen`, uint8 of shape (in_features, ceil(out_features / 2)).
        scales: `Frozen`, of shape (ceil(in_features / block), out_features): int8, or in
            `param_dtype` without double_quant.
        scale_steps: `Frozen`, with double_quant: steps of the scales, in `param_dtype`, of shape
            (ceil(in_features / block), ceil(out_features / 256)).
        scale_mean: `Frozen`, with double_quant: the mean of the scales, a number.
        bias: `Frozen` or `nnx.Param` of shape (out_features,), or None.

    Raises:
        ValueError: the block is no positive integer; a weight is not finite; a `dot_general` or
            `promote_dtype` of the user's own, which cannot multiply with codes.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> linear = nnx.Linear(128, 256, rngs=nnx.Rngs(0))
        >>> layer = fcg.NF4Linear.from_layer(linear)
        >>> layer(jnp.ones((2, 128))).shape
        (2, 256)
        >>> sum(v.nbytes for v in (layer.codes, layer.scales, layer.scale_steps))
        16904
        >>> linear.kernel.nbytes
        131072
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block: int = 64,
        double_quant: bool = True,
        train_bias: bool = False,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        self.block = checked_block(type(self).__name__, block)
        self.double_quant = double_quant
        super().__init__(
            in_features, out_features, self.form, train_bias=train_bias, rngs=rngs, **linear
        )

    @property
    def form(self) -> NF4:
        """How the kernel is stored."""
        return NF4(self.block, self.double_quant)
