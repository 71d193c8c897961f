"""LoRA: a product with a kernel of low rank, alone or beside another layer.

    forward   h[..., r]  = sum_i x[..., i] A[i, r]
              y[..., o]  = sum_r h[..., r] B[r, o]
    backward  dB[r, o]   = sum_... h[..., r] g[..., o]
              dh[..., r] = sum_o g[..., o] B[r, o]
              dA[i, r]   = sum_... x[..., i] dh[..., r]
              dx[..., i] = sum_r dh[..., r] A[i, r]
    kept      x, A and B as they came, and h, which is of the rank's width: to compute it again
              would cost a sixth of the step and save a hundredth of what x takes.

The sums run in float32 and are cast once. Source: Hu et al. 2021, arXiv:2106.09685.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
from flax import nnx
from flax.nnx.nn import dtypes

from flax_customgrad.contract.compat import set_class
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters, has_custom_backward, parameters
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient


class Residuals(NamedTuple):
    """What the backward of `lora` keeps: what the caller holds, and h of the rank's width."""

    params: Parameters
    x: jax.Array
    h: jax.Array
    how: MatmulConfig


@custom_vjp
def lora(params: Parameters, x: jax.Array, how: MatmulConfig) -> jax.Array:
    """Applies a linear map of low rank over the last axis.

    Args:
        params: `lora_a` of shape (in_features, rank), `lora_b` of shape (rank, out_features).
        x: inputs of shape (..., in_features).
        how: dtype of the computation.

    Returns:
        Outputs of shape (..., out_features), in the dtype of the computation.
    """
    return _fwd(params, x, how)[0]


def _fwd(params: Parameters, x: jax.Array, how: MatmulConfig) -> tuple[jax.Array, Residuals]:
    x_, a, b = how.promote(x, params["lora_a"], params["lora_b"])
    h = x_ @ a
    return h @ b, Residuals(params, x, h, how)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None]:
    params = res.params
    x, a, b = res.how.promote(res.x, params["lora_a"], params["lora_b"])
    rows, last = tuple(range(g.ndim - 1)), g.ndim - 1
    db = parameter_gradient(res.h, g, ((rows, rows), ((), ())), like=params["lora_b"])
    dh = parameter_gradient(g, b, (((last,), (1,)), ((), ())), like=res.h)
    da = parameter_gradient(x, dh, ((rows, rows), ((), ())), like=params["lora_a"])
    dx = input_gradient(dh, a, (((last,), (1,)), ((), ())), like=res.x)
    chex.assert_equal_shape([dx, x])
    chex.assert_equal_shape([da, a])
    chex.assert_equal_shape([db, b])
    return nnx.State({"lora_a": da, "lora_b": db}), dx, None


lora.defvjp(_fwd, _bwd)


class LoRA(nnx.LoRA):
    """`nnx.LoRA` with float32 sums in its backward and no copy of the kernels kept.

    Constructor, parameters, initial values and results are those of `flax.nnx.LoRA`. With a
    `promote_dtype` of the user's own, and for integer or complex inputs, the layer computes as
    nnx does and JAX differentiates that.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.LoRA(3, 2, 4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 3))).shape
        (16, 4)
    """

    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        """Applies the layer, and adds what the base module gives for the same input.

        Args:
            x: array of shape (..., in_features).
            **kwargs: passed on to the base module.

        Returns:
            Array of shape (..., out_features).

        Raises:
            ValueError: the base module is not callable.
        """
        params = parameters(self, "lora_a", "lora_b")
        if self.promote_dtype is not dtypes.promote_dtype or not has_custom_backward(x, params):
            return super().__call__(x, **kwargs)
        out = lora(params, x, MatmulConfig(self.dtype))
        if self.base_module is not None:
            if not callable(self.base_module):
                raise ValueError("`self.base_module` must be callable.")
            out += self.base_module(x, **kwargs)
        return out


class LoRALinear(nnx.LoRALinear, Linear):
    """`nnx.LoRALinear` made of `Linear` and `LoRA` of this library.

    Constructor, parameters, initial values and results are those of `flax.nnx.LoRALinear`.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((16, 3))).shape
        (16, 4)
    """

    # nnx.LoRALinear adds `self.lora(x)` to what the next class in line computes: our Linear.

    @functools.wraps(nnx.LoRALinear.__init__)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        set_class(self.lora, LoRA)
