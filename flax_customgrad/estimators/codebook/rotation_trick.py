"""The rotation trick: the gradient is rotated and stretched as `q` is against `z`.

    forward   y  = q
    backward  dz = stretch R^T g,  dq = 0
              stretch = |q| / |z|,  u = z / |z|,  v = q / |q|,  r = (u + v) / |u + v|
              R^T g = g - 2 r (r.g) + 2 u (v.g)
    kept      z and q

R rotates `u` into `v` and is a constant to the gradient, so `y = stretch R z`. It is made of two
reflections, `R^T = (I - 2 u u^T) (I - 2 r r^T)`, and computed as such: `|R^T g| = |g|` whatever the
rounding of `r`. In the formula itself, `r` of nearly opposite vectors is nothing but rounding, and
makes the gradient up to three times too long. At any angle the result is that of the formula for
vectors which differ from `z` and `q` by a few roundings; the formula changes much with those of
nearly opposite vectors, and with no others.

    z = 0     no direction: straight through, dz = g
    q = 0     stretch = 0: dz = 0
    v = -u    no plane to rotate in: u is reflected instead, R^T g = g - 2 u (u.g), which takes it
              to v as well: r = 0. This applies up to |u + v| of 8 roundings.

Norms are computed in float32 or wider after division by a power of two, so they are right where the
elements are normal numbers; `stretch` is at most the largest number there is.

Source: arXiv:2410.06424
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.scaling import magnitude


class Residuals(NamedTuple):
    """What the backward of `rotation_trick` keeps."""

    z: jax.Array
    q: jax.Array


@custom_vjp(surrogate=True)
def rotation_trick(z: jax.Array, q: jax.Array) -> jax.Array:
    """Returns `q`, and passes the gradient to `z`, rotated and stretched from q to z.

    Args:
        z: array of shape (..., features), float: what was quantized.
        q: array of z's shape, float: what it was quantized to. Its gradient is 0.

    Returns:
        q, in the dtype to which z and q promote.

    Raises:
        ValueError: z and q differ in shape, or have no axis of features.

    Example:
        >>> import jax, jax.numpy as jnp, flax_customgrad as fcg
        >>> z, q = jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0])
        >>> jax.grad(lambda z: fcg.rotation_trick(z, q)[1])(z).round(3)
        Array([0.5, 0. ], dtype=float32)

    Source: arXiv:2410.06424
    """
    if z.shape != q.shape or not z.ndim:
        raise ValueError(
            f"rotation_trick: z has shape {z.shape} and q {q.shape}; both must be (..., features)"
        )
    return q.astype(jnp.result_type(z, q))


def _fwd(z: jax.Array, q: jax.Array) -> tuple[jax.Array, Residuals]:
    return rotation_trick(z, q), Residuals(z, q)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None]:
    chex.assert_equal_shape([g, res.z, res.q])
    dz = rotate_back(g, res.z, res.q)
    chex.assert_equal_shape([dz, g])
    return dz, None


rotation_trick.defvjp(_fwd, _bwd)


@functools.partial(jax.jit, inline=True)
def rotate_back(g: jax.Array, z: jax.Array, q: jax.Array) -> jax.Array:
    """`dz = stretch R^T g`, the gradient rotated from the direction of `q` to that of `z`.

    Args:
        g: array of shape (..., features), float.
        z: array of that shape, float.
        q: array of that shape, float.

    Returns:
        Array of that shape, float32 or wider.
    """
    g, z, q = widened(jnp.result_type(g, z, q), g, z, q)
    polar_z, polar_q = _polar(z), _polar(q)
    u, v = polar_z.direction, polar_q.direction
    r = _half_way(u, v)
    stretch = polar_q.norm / polar_z.norm * (polar_q.power / polar_z.power)
    stretch = jnp.where(polar_q.is_zero, 0, jnp.minimum(stretch, jnp.finfo(stretch.dtype).max))
    rotated = _reflect(_reflect(g, r), u)
    return jnp.where(polar_z.is_zero, g, stretch * rotated)


class _Polar(NamedTuple):
    """A vector as `power norm direction`; where it is 0, the direction is 0 and the norm 1."""

    direction: jax.Array
    norm: jax.Array
    power: jax.Array
    is_zero: jax.Array


def _polar(x: jax.Array) -> _Polar:
    power = magnitude(x, (-1,))
    x = x / power
    squares = _dot(x, x)
    is_zero = squares == 0
    norm = jnp.sqrt(jnp.where(is_zero, 1, squares))
    return _Polar(x / norm, norm, power, is_zero)


def _half_way(u: jax.Array, v: jax.Array) -> jax.Array:
    """`r`, the unit vector half way from `u` to `v`; 0 between opposite ones."""
    difference, total = u - v, u + v
    # The two are at right angles, and the smaller one is so but for rounding. The sum of nearly
    # opposite vectors is little else, so it is made so. That of vectors at another angle is right
    # as it is, and there the difference may be all rounding: nothing may be divided by it.
    acute = _dot(u, v) >= 0
    along = _dot(difference, total) / jnp.where(acute, 1, _dot(difference, difference))
    total -= jnp.where(acute, 0, difference * along)
    squares = _dot(total, total)
    opposite = squares <= (8 * jnp.finfo(u.dtype).eps) ** 2
    return jnp.where(opposite, 0, total / jnp.sqrt(jnp.where(opposite, 1, squares)))


def _reflect(g: jax.Array, normal: jax.Array) -> jax.Array:
    """`g` reflected in the plane at right angles to a unit vector; as it is where that is 0."""
    return g - 2 * normal * _dot(normal, g)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, -1, keepdims=True)
