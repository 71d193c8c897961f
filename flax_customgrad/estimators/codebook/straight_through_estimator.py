"""The straight-through estimator: the value of one vector, the gradient of another.

    forward   y  = q
    backward  dz = g,  dq = 0
    kept      nothing

`y` is `q` to the bit; `z + stop_gradient(q - z)`, as it is often written, is off by rounding.

Source: arXiv:1308.3432
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from flax_customgrad.contract.custom_vjp import custom_vjp


class Residuals(NamedTuple):
    """What the backward of `straight_through_estimator` keeps: no array."""

    shape: tuple[int, ...]


@custom_vjp(surrogate=True)
def straight_through_estimator(z: jax.Array, q: jax.Array) -> jax.Array:
    """Returns `q`, and passes the gradient of the output to `z`.

    Args:
        z: array of any shape, float: what was quantized. It gets the gradient of the output.
        q: array of z's shape, float: what it was quantized to. Its gradient is 0.

    Returns:
        q, in the dtype to which z and q promote.

    Raises:
        ValueError: z and q differ in shape.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> z = jnp.array([0.2, 1.7])
        >>> jax.grad(lambda z: (fcg.straight_through_estimator(z, jnp.round(z)) ** 2).sum())(z)
        Array([0., 4.], dtype=float32)

    Source: arXiv:1308.3432
    """
    if z.shape != q.shape:
        raise ValueError(
            f"straight_through_estimator: z has shape {z.shape} and q {q.shape}; they must agree"
        )
    return q.astype(jnp.result_type(z, q))


def _fwd(z: jax.Array, q: jax.Array) -> tuple[jax.Array, Residuals]:
    return straight_through_estimator(z, q), Residuals(z.shape)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None]:
    chex.assert_shape(g, res.shape)
    return g, None


straight_through_estimator.defvjp(_fwd, _bwd)
