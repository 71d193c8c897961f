"""SwiGLU, GeGLU and ReGLU: two projections of the input, one of which gates the other.

    forward   gate = x W_gate,  up = x W_up,  y = f(gate) up
    backward  composed: that of the product, then that of both projections
    kept      x, gate, up and the kernels

The projections are `Linear`, the product is that of `gated`; each has its own backward. There is no
third projection back to the size of x: add a `Linear` for that. The source, arXiv:2002.05202,
leaves the biases out, as is the default.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
from flax.typing import DotGeneralT, Dtype, Initializer, PrecisionLike, PromoteDtypeFn
from jax import lax

from flax_customgrad.layers.activation.gated import geglu, reglu, swiglu
from flax_customgrad.layers.linear.linear import Linear


class _GatedLinear(nnx.Module):
    """The base of the three layers: two projections, `gate` and `up`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = nnx.initializers.zeros,
        dot_general: DotGeneralT = lax.dot_general,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        def projection() -> Linear:
            return Linear(
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

        self.gate, self.up = projection(), projection()

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features).
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.
        """
        return self._product(self.gate(inputs, out_sharding), self.up(inputs, out_sharding))

    def _product(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        raise NotImplementedError


class SwiGLU(_GatedLinear):
    """Two projections, multiplied: silu(x W_gate) * (x W_up).

    Attributes:
        gate: the `Linear` whose output goes through the activation.
        up: the other `Linear`.

    Args:
        in_features: size of the last axis of the inputs.
        out_features: size of the last axis of the outputs.
        use_bias: whether both projections have a bias.
        dtype: dtype of the computation of both, None for the promoted one of inputs and parameters.
        param_dtype: dtype of the parameters.
        precision: `jax.lax.Precision` of the products.
        kernel_init: initializer of both kernels.
        bias_init: initializer of both biases.
        dot_general: a product to use instead of `jax.lax.dot_general`; JAX differentiates it.
        promote_dtype: a promotion to use instead of that of nnx; JAX differentiates the layer then.
        preferred_element_type: dtype of the results of the products, or None.
        rngs: random numbers for the parameters.
        kernel_metadata: metadata of both kernels.
        bias_metadata: metadata of both biases.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.SwiGLU(3, 8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 3))).shape
        (2, 8)

    Source: arXiv:2002.05202
    """

    def _product(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return swiglu(gate, up)


class GeGLU(_GatedLinear):
    """Two projections, multiplied: gelu(x W_gate) * (x W_up).

    Attributes:
        gate: the `Linear` whose output goes through the activation.
        up: the other `Linear`.
        approximate: which form of gelu.

    Args:
        in_features: size of the last axis of the inputs.
        out_features: size of the last axis of the outputs.
        approximate: which form of gelu: by tanh, or exact.
        use_bias: whether both projections have a bias.
        dtype: dtype of the computation of both, None for the promoted one of inputs and parameters.
        param_dtype: dtype of the parameters.
        precision: `jax.lax.Precision` of the products.
        kernel_init: initializer of both kernels.
        bias_init: initializer of both biases.
        dot_general: a product to use instead of `jax.lax.dot_general`; JAX differentiates it.
        promote_dtype: a promotion to use instead of that of nnx; JAX differentiates the layer then.
        preferred_element_type: dtype of the results of the products, or None.
        rngs: random numbers for the parameters.
        kernel_metadata: metadata of both kernels.
        bias_metadata: metadata of both biases.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.GeGLU(3, 8, approximate=False, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 3))).shape
        (2, 8)

    Source: arXiv:2002.05202
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        approximate: bool = True,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = nnx.initializers.zeros,
        dot_general: DotGeneralT = lax.dot_general,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
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
        self.approximate = approximate

    def _product(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return geglu(gate, up, self.approximate)


class ReGLU(_GatedLinear):
    """Two projections, multiplied: relu(x W_gate) * (x W_up).

    Attributes:
        gate: the `Linear` whose output goes through the activation.
        up: the other `Linear`.

    Args:
        in_features: size of the last axis of the inputs.
        out_features: size of the last axis of the outputs.
        use_bias: whether both projections have a bias.
        dtype: dtype of the computation of both, None for the promoted one of inputs and parameters.
        param_dtype: dtype of the parameters.
        precision: `jax.lax.Precision` of the products.
        kernel_init: initializer of both kernels.
        bias_init: initializer of both biases.
        dot_general: a product to use instead of `jax.lax.dot_general`; JAX differentiates it.
        promote_dtype: a promotion to use instead of that of nnx; JAX differentiates the layer then.
        preferred_element_type: dtype of the results of the products, or None.
        rngs: random numbers for the parameters.
        kernel_metadata: metadata of both kernels.
        bias_metadata: metadata of both biases.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.ReGLU(3, 8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 3))).shape
        (2, 8)

    Source: arXiv:2002.05202
    """

    def _product(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return reglu(gate, up)
