"""Int4Linear: a linear layer with a frozen kernel in 4-bit integers.

How it computes is on the page `frozen_linear`, how the kernel is stored on the page `int4`.
"""

from typing import Any

from flax import nnx

from flax_customgrad.low_bit.frozen.frozen_linear import FrozenLinear
from flax_customgrad.low_bit.frozen.int4 import Int4
from flax_customgrad.low_bit.frozen.kernel_blocks import checked_block


class Int4Linear(FrozenLinear):
    """A linear layer whose kernel is frozen: 4-bit integers, one scale to a block of weights.

    It keeps codes between the passes, and no input, and dequantizes in the forward and again in
    the backward. It is no `nnx.Linear`, for it has no kernel that could be trained: code that
    looks for one by type finds none.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        block: how many weights of an output share a scale, along the inputs; None for all. The
            last block is shorter where it does not divide in_features.
        symmetric: whether 0 is in the middle of the range. Otherwise a block has a zero point,
            for weights that are mostly of one sign.
        train_bias: whether the bias is an `nnx.Param`; by default it is `Frozen` as well.
        rngs: random number generators; the kernel is that of `nnx.Linear`, quantized.
        **linear: what else `nnx.Linear` takes: use_bias, dtype, param_dtype, kernel_init and so
            on. `kernel_metadata` is that of the codes.

    Attributes:
        codes: `Frozen`, uint8 of shape (in_features, ceil(out_features / 2)).
        scales: `Frozen`, of shape (ceil(in_features / block), out_features), in `param_dtype`.
        zeros: `Frozen`, unless symmetric: the zero points, uint8 of shape
            (ceil(in_features / block), ceil(out_features / 2)).
        bias: `Frozen` or `nnx.Param` of shape (out_features,), or None.

    Raises:
        ValueError: the block is no positive integer; a weight is not finite; a `dot_general` or
            `promote_dtype` of the user's own, which cannot multiply with codes.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Int4Linear(256, 64, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 256))).shape
        (2, 64)
        >>> layer.codes.nbytes, layer.scales.nbytes, layer.kernel.nbytes
        (8192, 512, 65536)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block: int | None = 128,
        symmetric: bool = True,
        train_bias: bool = False,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        self.block = None if block is None else checked_block(type(self).__name__, block)
        self.symmetric = symmetric
        super().__init__(
            in_features, out_features, self.form, train_bias=train_bias, rngs=rngs, **linear
        )

    @property
    def form(self) -> Int4:
        """How the kernel is stored."""
        return Int4(self.block, self.symmetric)
