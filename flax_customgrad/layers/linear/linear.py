"""Linear: a product of the input's last axis with a kernel, and a bias.

    forward   y[..., o]     = sum_i x[..., i] kernel[i, o] + bias[o]
    backward  dx[..., i]    = sum_o g[..., o] kernel[i, o]
              dkernel[i, o] = sum_... x[..., i] g[..., o]
              dbias[o]      = sum_... g[..., o]
    kept      x and the parameters, as they came: no copy of the kernel in the compute dtype.

By the chain rule, where g is the cotangent of y, and y is linear in each of its arguments:

    dx[..., i]    = sum_o g[..., o] ∂y[..., o]/∂x[..., i] = sum_o g[..., o] kernel[i, o]
    dkernel[i, o] = sum_... g[..., o] ∂y[..., o]/∂kernel[i, o] = sum_... g[..., o] x[..., i]
    dbias[o]      = sum_... g[..., o] ∂y[..., o]/∂bias[o] = sum_... g[..., o]

The sums of `dkernel` and `dbias` run in float32, and each is cast once, to the dtype of its
parameter. Autodiff of nnx.Linear in bfloat16 rounds `dkernel` (off by 2e-3) and sums `dbias` in
bfloat16: with 8192 rows and cotangents of one sign it is off by 3e-3 where XLA splits the sum over
vector lanes, by 1e-1 where it adds row by row.
"""

from typing import Any, NamedTuple

import chex
import jax
from flax import nnx
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import (
    Parameters,
    given,
    has_custom_product,
    has_own_bias,
    parameters,
)
from flax_customgrad.numerics.accumulation import total
from flax_customgrad.numerics.broadcasting import plus_bias
from flax_customgrad.numerics.dtypes import as_array
from flax_customgrad.numerics.products import MatmulConfig, input_gradient, parameter_gradient


class Residuals(NamedTuple):
    """What the backward of `linear` keeps: only what the caller holds anyway."""

    params: Parameters
    x: jax.Array
    config: MatmulConfig


@custom_vjp(leading_axes=True)
def linear(params: Parameters, x: jax.Array, config: MatmulConfig) -> jax.Array:
    """Applies a linear map over the last axis.

    Args:
        params: `kernel` of shape (in_features, out_features), float; `bias` of shape
            (out_features,), or no bias.
        x: inputs of shape (..., in_features), float.
        config: dtype, precision and sharding.

    Returns:
        Outputs of shape (..., out_features), in the dtype of the computation.
    """
    x, kernel, bias = config.promote(x, params["kernel"], params.get("bias"))
    y = lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **config.forward_kwargs())
    return plus_bias(y, bias)


def _fwd(params: Parameters, x: jax.Array, config: MatmulConfig) -> tuple[jax.Array, Residuals]:
    return linear(params, x, config), Residuals(params, x, config)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None]:
    params, config = res.params, res.config
    x, kernel = config.promote(res.x, params["kernel"])
    dims = chex.Dimensions(I=kernel.shape[0], O=kernel.shape[1])
    batch, rows, last = x.shape[:-1], tuple(range(g.ndim - 1)), g.ndim - 1
    chex.assert_shape([x, g], [(*batch, *dims["I"]), (*batch, *dims["O"])])
    over_o, over_rows = (((last,), (1,)), ((), ())), ((rows, rows), ((), ()))
    dx = input_gradient(g, kernel, over_o, like=res.x, precision=config.precision)
    dkernel = parameter_gradient(x, g, over_rows, like=kernel, precision=config.precision)
    chex.assert_shape([dx, dkernel], [x.shape, dims["IO"]])
    grads = {"kernel": dkernel}
    if "bias" in params:
        dbias = grads["bias"] = total(g, rows)
        chex.assert_shape([dbias, params["bias"]], dims["O"])
    return nnx.State(grads), dx, None


linear.defvjp(_fwd, _bwd)


class Linear(nnx.Linear):
    """`nnx.Linear` with float32 sums in its backward and no copy of the kernel kept.

    Constructor, parameters, initial values and results are those of `flax.nnx.Linear`. With a
    `dot_general` or `promote_dtype` of the user's own, a bias of another shape than the kernel's
    outputs, and for integer or complex inputs, the layer computes as nnx does and JAX
    differentiates that. So it does while a tool such as qwix replaces the products of JAX.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> layer = fcg.Linear(3, 4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 3))).shape
        (2, 4)
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of shape (..., in_features).
            out_sharding: sharding of the result on a mesh with Explicit axes, or None.

        Returns:
            Array of shape (..., out_features), in `dtype` or the promoted dtype.
        """
        x, params = as_array(inputs), parameters(self, "kernel", "bias")
        shape = params["kernel"].shape
        if (
            self.dot_general is not lax.dot_general
            or len(shape) != 2
            or not has_own_bias(self, params, shape[1:])
            or not has_custom_product(self, x, params)
        ):
            return super().__call__(inputs, **given(out_sharding=out_sharding))
        config = MatmulConfig(self.dtype, self.precision, self.preferred_element_type, out_sharding)
        return linear(params, x, config)
