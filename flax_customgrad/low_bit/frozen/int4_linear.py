"""Int4Linear: a linear layer with a frozen kernel in 4-bit integers.

    forward   kernel     = (code - zero point) scale, dequantized
              y[..., o]  = sum_i x[..., i] kernel[i, o] + bias[o]
    backward  kernel     dequantized again
              dx[..., i] = sum_o g[..., o] kernel[i, o]
              dbias[o]   = sum_... g[..., o]
    kept      codes and scales: no kernel in floats, and no x

That is the operation `frozen_linear`; how the kernel is stored is on the page `int4`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import lax

from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.low_bit.frozen.frozen_linear import FrozenLinear
from flax_customgrad.low_bit.frozen.int4 import Int4
from flax_customgrad.numerics.argument_checks import check_size


class Int4Linear(FrozenLinear):
    """A linear layer whose kernel is frozen: 4-bit integers, one scale to a block of weights.

    It keeps codes between the passes, and no input, and dequantizes in the forward and again in
    the backward. It is no `nnx.Linear`, for it has no kernel that could be trained: code that
    looks for one by type finds none.

    Takes what `flax.nnx.Linear` takes, but no `dot_general` or `promote_dtype` of the user's own,
    which cannot multiply with codes, and the arguments below. The kernel is that of
    `flax.nnx.Linear`, quantized; `kernel_metadata` is that of the codes.

    Args:
        block: how many weights of an output share a scale, along the inputs; None for all. The
            last block is shorter where it does not divide in_features.
        symmetric: whether 0 is in the middle of the range. Otherwise a block has a zero point,
            for weights that are mostly of one sign.
        train_bias: whether the bias is an `nnx.Param`; by default it is `Frozen` as well.

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
        block: int | None = 128,
        symmetric: bool = True,
        train_bias: bool = False,
    ):
        if block is not None:
            block = check_size(type(self).__name__, "block", block)
        self.block = block
        self.symmetric = symmetric
        layer = Linear(
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
        super().__init__(
            layer,
            Int4(block, symmetric),
            train_bias=train_bias,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
