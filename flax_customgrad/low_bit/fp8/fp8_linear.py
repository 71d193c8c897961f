"""Fp8Linear: a linear layer that multiplies in 8-bit floats.

    forward   y  = s_x s_w q_x q_w + b          q_x, q_w: codes in E4M3, for the scales s_x, s_w
    backward  dx = s_g s_w q_g q_w^T            q_g: codes in E5M2, for the scale s_g
              dw = s_x s_g q_x^T q_g
              db = sum g
    kept      q_x, one byte an element, and scales

That is the operation `fp8_product` of the product `linear`; codes are in `fp8_codes`, scales
of steps in `fp8_scaling`.

Source: arXiv:2209.05433
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import lax

from flax_customgrad.layers.linear.linear import Linear, linear
from flax_customgrad.layers.replaced_matmul import operands
from flax_customgrad.low_bit.fp8.fp8_layer import Fp8Layer, Scaling
from flax_customgrad.low_bit.fp8.fp8_product import Fp8Config, fp8_product
from flax_customgrad.numerics.products import MatmulConfig


class Fp8Linear(Linear, Fp8Layer):
    """`Linear` in 8-bit floats: E4M3 for input and kernel, E5M2 for the gradient.

    Takes what `flax.nnx.Linear` takes, but no `dot_general` or `promote_dtype` of the user's own,
    and the arguments below. Parameters, their names and initial values are those of
    `flax.nnx.Linear`.

    The histories and scales of delayed scaling, that of the gradient included, are held in a
    `BackwardState` each: the backward pass writes them, and an optimizer need not know of them. A
    forward alone, as in evaluation, writes nothing. Each gradient is one step; where an optimizer
    steps after several, as in gradient accumulation, `begin_step` says where a step begins. Within
    a step the histories take the maximum, also over calls of one layer.

    `backward_state` and `load_backward_state` save and restore them. Of layers that `nnx.vmap` has
    stacked each has its own, after `reset_backward_state`. JAX cannot write them under `jax.vmap`
    of the gradient, in `jax.shard_map` or in `jax.export`, which are errors: take
    `scaling="current"` there, or for inference `pack`, which puts the scales of that moment beside
    the codes. In a `shard_map` current scales are those of each device's part of an array.

    Args:
        scaling: "delayed" takes scales from the maxima of the last steps, "current" from the
            arrays at hand, which are read once more for it.
        history: how many steps delayed scaling remembers.
        margin: how many halvings of a range are left unused, so that what grows by 2^margin from
            one step to the next is not clipped.

    Attributes:
        scaling: "delayed" or "current".
        margin: how many halvings of a range are left unused.
        delayed: the histories and scales, a `DelayedScaling`; None with current scaling.

    Raises:
        ValueError: `scaling` is neither word, `history` is below 1 or `margin` not from 0 to 15; or
            `dot_general` or `promote_dtype` is the user's own.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Fp8Linear(4, 3, history=2, rngs=nnx.Rngs(0))
        >>> x = jnp.arange(8.).reshape(2, 4)
        >>> grads = nnx.grad(lambda layer, x: 5 * layer(x).sum())(layer, x)
        >>> input_history, _, gradient_history = layer.delayed.amax_history[...]
        >>> input_history, gradient_history
        (Array([7., 0.], dtype=float32), Array([5., 0.], dtype=float32))

    Source: arXiv:2209.05433
    """

    _reference = nnx.Linear

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
        scaling: Scaling = "delayed",
        history: int = 1024,
        margin: int = 0,
    ):
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
        self._set_scaling(scaling, history, margin)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features), float.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `preferred_element_type`, `dtype` or the
            promoted dtype.

        Raises:
            TypeError: the inputs are not floating.
        """
        params, x = operands(self, inputs, "kernel", "bias")
        config = Fp8Config(
            op=linear,
            # Of codes: what dtype the result has is decided when they are scaled.
            statics=(MatmulConfig(precision=self.precision, out_sharding=out_sharding),),
            bias_shape=(*(1,) * (x.ndim - 1), self.out_features),
            matmul=MatmulConfig(self.dtype, preferred_element_type=self.preferred_element_type),
            margin=self.margin,
        )
        return fp8_product(params, x, *self._state, config)
