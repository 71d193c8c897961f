"""SwiGLU, GeGLU and ReGLU: two projections of the input, one of which gates the other.

    forward   y = f(x W_gate) * (x W_up)

The projections are `Linear`, the product is that of `gated`; each has its own backward. What is
kept is x, both projections and the kernels. There is no third projection back to the size of x:
add a `Linear` for that. Source: arXiv:2002.05202, which leaves the biases out, as is the default.
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.layers.activation.gated import geglu, reglu, swiglu
from flax_customgrad.layers.linear.linear import Linear


class _GatedLinear(nnx.Module):
    """What the three layers share: `gate` and `up`, made alike."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        self.gate = Linear(in_features, out_features, use_bias=use_bias, rngs=rngs, **linear)
        self.up = Linear(in_features, out_features, use_bias=use_bias, rngs=rngs, **linear)

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
    """Two projections, multiplied: silu(x W_gate) * (x W_up). Its source is arXiv:2002.05202.

    Attributes:
        gate: the `Linear` whose output goes through the activation.
        up: the other `Linear`.

    Args:
        in_features: size of the last axis of the inputs.
        out_features: size of the last axis of the outputs.
        use_bias: whether both projections have a bias.
        rngs: random numbers for the parameters.
        **linear: what else `nnx.Linear` takes, for both: dtype, param_dtype, precision,
            kernel_init, kernel_metadata and so on.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.SwiGLU(3, 8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 3))).shape
        (2, 8)
    """

    def _product(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return swiglu(gate, up)


class GeGLU(_GatedLinear):
    """Two projections, multiplied: gelu(x W_gate) * (x W_up). Its source is arXiv:2002.05202.

    Attributes:
        gate: the `Linear` whose output goes through the activation.
        up: the other `Linear`.
        approximate: which form of gelu.

    Args:
        in_features: size of the last axis of the inputs.
        out_features: size of the last axis of the outputs.
        approximate: which form of gelu: by tanh, or exact.
        use_bias: whether both projections have a bias.
        rngs: random numbers for the parameters.
        **linear: what else `nnx.Linear` takes, as for `SwiGLU`.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.GeGLU(3, 8, approximate=False, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 3))).shape
        (2, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        approximate: bool = True,
        use_bias: bool = False,
        rngs: nnx.Rngs,
        **linear: Any,
    ):
        super().__init__(in_features, out_features, use_bias=use_bias, rngs=rngs, **linear)
        self.approximate = approximate

    def _product(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return geglu(gate, up, self.approximate)


class ReGLU(_GatedLinear):
    """Two projections, multiplied: relu(x W_gate) * (x W_up). Its source is arXiv:2002.05202.

    Attributes:
        gate: the `Linear` whose output goes through the activation.
        up: the other `Linear`.

    Args:
        in_features: size of the last axis of the inputs.
        out_features: size of the last axis of the outputs.
        use_bias: whether both projections have a bias.
        rngs: random numbers for the parameters.
        **linear: what else `nnx.Linear` takes, as for `SwiGLU`.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.ReGLU(3, 8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 3))).shape
        (2, 8)
    """

    def _product(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return reglu(gate, up)
