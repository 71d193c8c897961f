"""`leak`: one step of a leaking state, which keeps a share of itself and adds the input.

    forward   y  = a u + x
    backward  dx = g
              du = a g
              da = sum of g u, over the axes along which a was repeated
    kept      a; u as well where a is learned

Half precision is computed in float32 and rounded once, and the gradient of a is summed in float32,
where autodiff sums it in the dtype of u.
"""

from typing import Any, NamedTuple

import chex
import jax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.broadcasting import sum_to_shape


class Residuals(NamedTuple):
    """What the backward of `leak` keeps."""

    decay: jax.Array
    u: jax.Array | None
    dtype: Any


@custom_vjp
def leak(decay: jax.Array, u: jax.Array, x: jax.Array, learned: bool) -> jax.Array:
    """One step of a leaking state.

    Args:
        decay: a, array that broadcasts to u, float.
        u: the state, array of any shape, float.
        x: the input, array of the same shape, float.
        learned: whether the decay gets a gradient.

    Returns:
        The new state, array like u.
    """
    dtype = accumulator(decay, u, x)
    a = decay.astype(dtype)
    return (a * u.astype(dtype) + x.astype(dtype)).astype(u.dtype)


def _fwd(
    decay: jax.Array, u: jax.Array, x: jax.Array, learned: bool
) -> tuple[jax.Array, Residuals]:
    dtype = accumulator(decay, u, x)
    return leak(decay, u, x, learned), Residuals(decay, u if learned else None, dtype)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array | None, jax.Array, jax.Array, None]:
    g, a = g.astype(res.dtype), res.decay.astype(res.dtype)
    chex.assert_is_broadcastable(a.shape, g.shape)
    du, dx = a * g, g
    chex.assert_equal_shape([du, dx, g])
    if res.u is None:
        return None, du, dx, None
    u = res.u.astype(res.dtype)
    chex.assert_equal_shape([u, g])
    da = sum_to_shape(g * u, a.shape)
    chex.assert_equal_shape([da, a])
    return da, du, dx, None


leak.defvjp(_fwd, _bwd)
