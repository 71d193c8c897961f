"""PReLU: a rectifier whose slope for x < 0 is a parameter.

    forward   y  = x where x >= 0,  a x elsewhere
    backward  dx = g where x >= 0,  a g elsewhere
              da = sum of g x where x < 0
    kept      x and a, which the caller holds

The slope's gradient is a sum over every element of x. It is summed in float32: autodiff of
nnx.PReLU sums it in the dtype of x, which with cotangents of one sign is wrong by 60% for a million
elements of bfloat16, and minus infinity in float16.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import Parameters, parameters
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.broadcasting import sum_to_shape
from flax_customgrad.numerics.dtypes import as_array, takes_custom_backward


class Residuals(NamedTuple):
    """What the backward of `prelu` keeps: only what the caller holds anyway."""

    params: Parameters
    x: jax.Array
    dtype: Any


@custom_vjp
def prelu(params: Parameters, x: jax.Array, dtype: Any) -> jax.Array:
    """Applies the rectifier.

    Args:
        params: `negative_slope`, a float, or an array that broadcasts against x.
        x: array of any shape, float.
        dtype: dtype of the computation, to which the slope is rounded too.

    Returns:
        Array like x, in that dtype.
    """
    x, a = x.astype(dtype), params["negative_slope"].astype(dtype)
    return jnp.where(x >= 0, x, a * x)


def _fwd(params: Parameters, x: jax.Array, dtype: Any) -> tuple[jax.Array, Residuals]:
    return prelu(params, x, dtype), Residuals(params, x, dtype)


def _bwd(res: Residuals, g: jax.Array) -> tuple[nnx.State, jax.Array, None]:
    chex.assert_trees_all_equal_structs(dict(res.params), {"negative_slope": 0})
    x, a = (array.astype(res.dtype) for array in (res.x, res.params["negative_slope"]))
    chex.assert_type(g, res.dtype)
    chex.assert_is_broadcastable(x.shape, g.shape)
    chex.assert_is_broadcastable(a.shape, g.shape)
    g, x, a = (array.astype(accumulator(res.x, g)) for array in (g, x, a))
    dx = sum_to_shape(jnp.where(x >= 0, g, a * g), x.shape)
    da = sum_to_shape(jnp.where(x >= 0, 0, g * x), a.shape)
    chex.assert_equal_shape([dx, x])
    chex.assert_equal_shape([da, a])
    return nnx.State({"negative_slope": da}), dx, None


prelu.defvjp(_fwd, _bwd)


class PReLU(nnx.PReLU):
    """`nnx.PReLU` whose slope's gradient is summed in float32.

    Constructor, parameters, initial values and results are those of `flax.nnx.PReLU`: without a
    `dtype` the slope is rounded to the dtype of the inputs. With a `promote_dtype` of the user's
    own, and for integer or complex inputs, the layer computes as nnx does and JAX differentiates
    that.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> fcg.PReLU(negative_slope_init=0.5)(jnp.array([-2.0, 0.0, 3.0]))
        Array([-1.,  0.,  3.], dtype=float32)

    Source: arXiv:1502.01852
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer.

        Args:
            inputs: array of any shape.

        Returns:
            Array like inputs, in `dtype` or the dtype of the inputs.
        """
        x, params = as_array(inputs), parameters(self, "negative_slope")
        injected = self.promote_dtype is not dtypes.promote_dtype
        if injected or not takes_custom_backward(x, *params.values(), dtype=self.dtype or x.dtype):
            return super().__call__(inputs)
        return prelu(params, x, jnp.dtype(self.dtype or x.dtype))
