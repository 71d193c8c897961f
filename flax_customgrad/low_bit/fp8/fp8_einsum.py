"""Fp8Einsum: an einsum in 8-bit floats.

Written for 'nta,hab->nthb'; q_x and q_w are codes in E4M3 for the scales s_x and s_w, q_g are codes
in E5M2 for s_g:

    forward   y[n,t,h,b]  = s_x s_w sum_a q_x[n,t,a] q_w[h,a,b] + c[h,b]
    backward  dx[n,t,a]   = s_g s_w sum_hb q_g[n,t,h,b] q_w[h,a,b]
              dw[h,a,b]   = s_x s_g sum_nt q_x[n,t,a] q_g[n,t,h,b]
              dc[h,b]     = sum_nt g[n,t,h,b]
    kept      q_x, one byte an element, and scales

That is the operation `fp8_product` of the product `einsum`; codes are in `fp8_codes`, scales
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
from flax.typing import Dtype, Initializer, PrecisionLike, Shape

from flax_customgrad.layers.linear.einsum import Einsum, einsum
from flax_customgrad.layers.replaced_matmul import operands
from flax_customgrad.low_bit.fp8.fp8_layer import Fp8Layer, Scaling
from flax_customgrad.low_bit.fp8.fp8_product import Fp8Config, fp8_product
from flax_customgrad.numerics.products import MatmulConfig


class Fp8Einsum(Einsum, Fp8Layer):
    """`Einsum` in 8-bit floats: E4M3 for input and kernel, E5M2 for the gradient.

    Takes what `flax.nnx.Einsum` takes, but no `einsum_op` or `promote_dtype` of the user's own,
    and the arguments below. Parameters, their names and initial values are those of
    `flax.nnx.Einsum`; scaling, steps and state are those of `Fp8Linear`.

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
            `einsum_op` or `promote_dtype` is the user's own.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Fp8Einsum('nta,hab->nthb', (8, 2, 4), (8, 4), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 11, 2))).shape
        (16, 11, 8, 4)

    Source: arXiv:2209.05433
    """

    _reference = nnx.Einsum

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Shape,
        bias_shape: Shape | None = None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        promote_dtype: Any = dtypes.promote_dtype,
        einsum_op: Any = jnp.einsum,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scaling: Scaling = "delayed",
        history: int = 1024,
        margin: int = 0,
    ):
        super().__init__(
            einsum_str,
            kernel_shape,
            bias_shape,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=promote_dtype,
            einsum_op=einsum_op,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self._set_scaling(scaling, history, margin)

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: float array with an axis per label of the first operand.
            einsum_str: an equation that goes before that of the constructor, or None.
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array with an axis per label behind the arrow.

        Raises:
            TypeError: the inputs are not floating.
            ValueError: there is no equation, it does not fit inputs and kernel, or it repeats a
                label within an operand or broadcasts an axis of size 1; or a bias that was replaced
                has another number of elements than the outputs of the kernel.
        """
        params, x = operands(self, inputs, "kernel", "bias")
        kernel = params["kernel"]
        equation = self._regular_equation(einsum_str, x, params)
        sizes = dict(zip(equation.kernel, kernel.shape, strict=True))
        config = Fp8Config(
            op=einsum,
            # Of codes: what dtype the result has is decided when they are scaled.
            statics=(equation, MatmulConfig(precision=self.precision, out_sharding=out_sharding)),
            bias_shape=tuple(sizes.get(label, 1) for label in equation.y),
            matmul=MatmulConfig(self.dtype, preferred_element_type=self.preferred_element_type),
            margin=self.margin,
        )
        return fp8_product(params, x, *self._state, config)
