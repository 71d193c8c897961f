"""`fire`: a spike where the membrane is above the threshold, and a reset where there is a spike.

    forward   s  = 1 where v > theta, else 0
              u  = v - theta s            reset "subtract"
                   (1 - s) v              reset "zero"
                   v                      reset "none"
    backward  dr = -theta du, -v du, 0    of the spike in the reset, if that is differentiated
              dz = (ds + dr) p            of z = v - theta, p the surrogate of the spike
              dv = du + dz, (1 - s) du + dz, du + dz
              dtheta = sum(-s du - dz), sum(-dz), sum(-dz)
    kept      v and theta

By the chain rule, with p in place of the derivative of the step:

    ∂s/∂v = p,  ∂s/∂theta = -p
    ∂u/∂s = -theta, -v, 0              for the resets in turn; times du that is dr
    ∂u/∂v = 1, 1 - s, 1                for a fixed s
    dv    = du ∂u/∂v + (ds + dr) p

s and p are computed again, from v; autodiff keeps v - theta as well, and an operand of the reset.
The reset is not differentiated by default, dr = 0, as in snntorch and in the tutorial to
arXiv:1901.09948, https://github.com/fzenke/spytorch.
"""

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.numerics.accumulation import accumulator
from flax_customgrad.numerics.broadcasting import sum_to_shape

Reset = Literal["subtract", "zero", "none"]
"""What a spike does to the membrane: subtracts the threshold, sets it to zero, or nothing."""


class Residuals(NamedTuple):
    """What the backward of `fire` keeps."""

    threshold: jax.Array
    v: jax.Array
    spike: Any
    reset: Reset
    reset_gradient: bool


@custom_vjp(surrogate=True)
def fire(
    threshold: jax.Array, v: jax.Array, spike: Any, reset: Reset, reset_gradient: bool
) -> tuple[jax.Array, jax.Array]:
    """Fires and resets.

    Args:
        threshold: theta, array that broadcasts to v, float.
        v: membrane potential, array of any shape, float.
        spike: the step with its surrogate gradient; a function, or a `jax.tree_util.Partial` of
            one, whose arrays may be traced.
        reset: what a spike does to the membrane.
        reset_gradient: whether the spike in the reset is differentiated.

    Returns:
        The membrane potential after the reset, and the spikes; arrays like v.
    """
    wide, theta = _widened(v, threshold)
    s = spike(wide - theta)
    if reset == "subtract":
        u = wide - theta * s
    elif reset == "zero":
        u = jnp.where(s == 1, 0, wide)
    else:
        u = wide
    return u.astype(v.dtype), s.astype(v.dtype)


def _fwd(
    threshold: jax.Array, v: jax.Array, spike: Any, reset: Reset, reset_gradient: bool
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    out = fire(threshold, v, spike, reset, reset_gradient)
    return out, Residuals(threshold, v, spike, reset, reset_gradient)


def _bwd(
    res: Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None, None]:
    v, theta = _widened(res.v, res.threshold)
    chex.assert_is_broadcastable(theta.shape, v.shape)
    du, ds = (g.astype(v.dtype) for g in cotangents)
    chex.assert_equal_shape([du, ds, v])
    s, through_spike = jax.vjp(res.spike, v - theta)
    if not res.reset_gradient:
        s = lax.stop_gradient(s)
    dv, dr, dtheta = du, jnp.zeros_like(du), jnp.zeros_like(du)
    if res.reset == "subtract":
        dr, dtheta = -theta * du, -s * du
    elif res.reset == "zero":
        dv, dr = (1 - s) * du, -v * du
    (dz,) = through_spike(ds + dr if res.reset_gradient else ds)
    dv, dtheta = dv + dz, sum_to_shape(dtheta - dz, theta.shape)
    chex.assert_equal_shape([dz, dv, v])
    chex.assert_equal_shape([dtheta, theta])
    return dtheta, dv, None, None, None


fire.defvjp(_fwd, _bwd)


def _widened(v: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype = accumulator(v, threshold)
    return v.astype(dtype), threshold.astype(dtype)
