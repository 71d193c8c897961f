"""SpectralNorm: a weight divided by its largest singular value.

    forward   sigma = v w u^T              u and v by power iteration, held constant
              w_bar = w / sigma
    backward  along = sum(g w_bar) / sigma
              dw    = g / sigma + (dsigma - along) v^T u
    kept      w as it came, u, v and sigma

w is taken as a matrix, all its axes but the last as rows; u and v are rows of one. sigma is an
output as well, and dsigma is its cotangent. Power iteration and sums run in float32, and the norms
in them are those of `unit_norm`. Where sigma is 0 nothing is divided, as in nnx: w_bar is w, and dw
is `g + dsigma v^T u`.

Source: arXiv:1802.05957
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from flax_customgrad.contract.compat import is_traced, overrides_hook
from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.layers.drop_in import has_custom_backward
from flax_customgrad.layers.weight_norms.unit_norm import inverse_norm


class Residuals(NamedTuple):
    """What the backward of `spectral_norm` keeps: the caller's weight, and small arrays."""

    w: jax.Array
    u: jax.Array
    v: jax.Array
    sigma: jax.Array


@custom_vjp
def spectral_norm(w: jax.Array, u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divides a weight by its singular value between two vectors.

    Args:
        w: the weight, of shape (*in_features, out_features), float.
        u: the right vector, of shape (1, out_features), float; it gets no gradient.
        v: the left vector, of shape (1, in_features), float; it gets no gradient.

    Returns:
        The weight in float32 or wider, and the singular value, a number.
    """
    sigma = (v @ _matrix(w, v) @ u.T)[0, 0]
    return w / _divisor(sigma), sigma


def _fwd(w: jax.Array, u: jax.Array, v: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    w_bar, sigma = spectral_norm(w, u, v)
    return (w_bar, sigma), Residuals(w, u, v, sigma)


def _bwd(res: Residuals, cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None, None]:
    w, u, v, sigma = res
    g, dsigma = cotangents
    dims = chex.Dimensions(I=math.prod(w.shape[:-1]), O=w.shape[-1])
    chex.assert_shape([u, v], [dims["1O"], dims["1I"]])
    chex.assert_shape([g, sigma, dsigma], [w.shape, (), ()])
    divisor = _divisor(sigma)
    w_bar = w / divisor
    along = jnp.where(sigma != 0, jnp.sum(g * w_bar) / divisor, 0)
    dw = g / divisor + (dsigma - along) * (v.T * u).reshape(w.shape)
    return dw, None, None


spectral_norm.defvjp(_fwd, _bwd)


def power_iteration(
    w: jax.Array, u: jax.Array, n_steps: int, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Approximates the singular vectors of a weight's largest singular value, as constants.

    Args:
        w: the weight, of shape (*in_features, out_features), float.
        u: the right vector to start from, of shape (1, out_features), in float32 or wider.
        n_steps: how many steps of the iteration, at least one.
        epsilon: as in `unit_norm`.

    Returns:
        u of shape (1, out_features) and v of shape (1, in_features), each of norm 1.
    """
    matrix = lax.stop_gradient(_matrix(w, u))
    v = u
    for _ in range(n_steps):
        v = _unit(u @ matrix.T, epsilon)
        u = _unit(v @ matrix, epsilon)
    return u, v


def _matrix(w: jax.Array, like: jax.Array) -> jax.Array:
    return w.reshape(-1, w.shape[-1]).astype(like.dtype)


def _unit(row: jax.Array, epsilon: float) -> jax.Array:
    return row * inverse_norm(row, (0, 1), epsilon)


def _divisor(sigma: jax.Array) -> jax.Array:
    return jnp.where(sigma != 0, sigma, 1)


class SpectralNorm(nnx.SpectralNorm):
    """`nnx.SpectralNorm` that keeps the weight alone, and is right for tiny and huge weights.

    Constructor, call signature, state and results are those of `flax.nnx.SpectralNorm`; as there,
    a call writes the normalized weights into the wrapped layer. In half precision the arithmetic
    is in float32. Integer and complex weights are left to nnx and to JAX.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> layer = fcg.SpectralNorm(nnx.Linear(3, 4, rngs=rngs), n_steps=20, rngs=rngs)
        >>> layer(jnp.ones((2, 3))).shape
        (2, 4)
        >>> jnp.linalg.norm(layer.layer_instance.kernel[...], ord=2).round(5)
        Array(1., dtype=float32)

    Source: arXiv:1802.05957
    """

    @overrides_hook(nnx.SpectralNorm)
    def _spectral_normalize_inplace(
        self, path: tuple[Any, ...], orig_param: nnx.Variable, update_stats: bool
    ) -> None:
        w = orig_param[...]
        u, sigma = (self.batch_stats.get((*path, name)) for name in ("u", "sigma"))
        if (
            u is None
            or sigma is None
            or (w.ndim > 2 and self.error_on_non_matrix)
            or is_traced(self.epsilon)
            or not has_custom_backward(w, {"u": u[...]}, self.dtype)
        ):
            return super()._spectral_normalize_inplace(path, orig_param, update_stats)
        dtype = dtypes.canonicalize_dtype(w, u[...], dtype=self.dtype)
        start = lax.stop_gradient(u[...].astype(jnp.result_type(jnp.float32, w, u[...])))
        new_u, v = power_iteration(w, start, self.n_steps, float(self.epsilon))
        w_bar, new_sigma = spectral_norm(w, new_u, v)
        if update_stats:
            u[...] = new_u.astype(u.dtype)
            sigma[...] = new_sigma.astype(sigma.dtype)
        orig_param[...] = w_bar.astype(dtype).astype(w.dtype)
