"""FSQ, finite scalar quantization: each feature rounded to one of a few levels.

    forward   y  = round(h tanh(z + shift) - offset) / half
    backward  dz = g h sech^2(z + shift) / half              round has the derivative 1
    kept      z

    half   = floor(levels / 2)
    h      = (levels - 1) (1 + epsilon) / 2
    offset = 1/2 for an even number of levels, 0 for an odd one
    shift  = arctanh(offset / h), so that 0 is rounded to 0

`round` is half to even, and `y` is from -1 to 1; for an even number of levels, -1 is a level and 1
is not. `epsilon` is 1e-3 as in the paper for up to 501 levels, and less for more, of which the
outermost would otherwise be rounded to one too many. `sech^2 = 1 - tanh^2` is accurate far out,
where that difference is rounding. Half precision is computed in float32.

Source: arXiv:2309.15505
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_customgrad.contract.custom_vjp import custom_vjp
from flax_customgrad.contract.promotion import promoting
from flax_customgrad.estimators.codebook.codebook_arguments import check_mask, check_vectors
from flax_customgrad.estimators.codebook.masks import where_code, where_mask, where_vector
from flax_customgrad.estimators.codebook.usage import Quantized, measure_usage
from flax_customgrad.numerics.argument_checks import integers, is_integer
from flax_customgrad.numerics.dtypes import widened
from flax_customgrad.numerics.hyperbolic import sech_squared

Levels = tuple[int, ...]


class Residuals(NamedTuple):
    """What the backward of `round_to_levels` keeps: only what the caller holds anyway."""

    z: jax.Array
    levels: Levels


@custom_vjp(surrogate=True)
def round_to_levels(z: jax.Array, levels: Levels) -> jax.Array:
    """Rounds each feature to one of its levels.

    Args:
        z: array of shape (..., len(levels)), float.
        levels: how many levels each feature has, at least 2.

    Returns:
        Array of z's shape and dtype, from -1 to 1.
    """
    return (_rounded(z, levels) / _half(levels)).astype(z.dtype)


def _fwd(z: jax.Array, levels: Levels) -> tuple[jax.Array, Residuals]:
    return round_to_levels(z, levels), Residuals(z, levels)


def _bwd(res: Residuals, g: jax.Array) -> tuple[jax.Array, None]:
    g, z = widened(jnp.result_type(g, res.z), g, res.z)
    h, _, shift = _bounds(res.levels, z.dtype)
    half = _half(res.levels)
    dims = chex.Dimensions(F=len(res.levels))
    chex.assert_shape([g, z], (*z.shape[:-1], *dims["F"]))
    chex.assert_shape([h, shift, half], dims["F"])
    dz = g * h * sech_squared(z + shift) / half
    chex.assert_equal_shape([dz, g])
    return dz, None


round_to_levels.defvjp(_fwd, _bwd)


def _rounded(z: jax.Array, levels: Levels) -> jax.Array:
    """The level of each feature, from -half on, in float32 or wider."""
    (z,) = widened(z.dtype, z)
    h, offset, shift = _bounds(levels, z.dtype)
    return jnp.round(h * jnp.tanh(z + shift) - offset)


def _bounds(levels: Levels, dtype: jnp.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`h`, `offset` and `shift` of each feature."""
    n = np.array(levels, np.float64)
    epsilon = np.minimum(1e-3, 0.5 / (n - 1))
    h = (n - 1) * (1 + epsilon) / 2
    offset = np.where(n % 2 == 0, 0.5, 0.0)
    return h.astype(dtype), offset.astype(dtype), np.arctanh(offset / h).astype(dtype)


def _half(levels: Levels) -> np.ndarray:
    return np.array(levels, np.int32) // 2


class FSQ(nnx.Module):
    """Rounds each feature to one of its levels; all combinations of levels are the codebook.

    It has no parameters, and needs no loss: `loss` is 0. The paper suggests levels of (8, 6, 5) for
    2^8 codes, (8, 5, 5, 5) for 2^10, (7, 5, 5, 5, 5) for 2^12, (8, 8, 8, 6, 5) for 2^14 and
    (8, 8, 8, 5, 5, 5) for 2^16.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> layer = fcg.FSQ((5, 4))
        >>> out = layer(jnp.array([[0.0, 0.0], [9.0, -9.0]]))
        >>> out.values
        Array([[ 0.,  0.],
               [ 1., -1.]], dtype=float32)
        >>> out.indices
        Array([12,  4], dtype=int32)

    Source: arXiv:2309.15505
    """

    def __init__(self, levels: Sequence[int]):
        """Makes the layer.

        Args:
            levels: how many levels each feature has, at least 2. With 2, the step lies far from 0
                and little gradient passes; use 3, or `LFQ`.

        Raises:
            ValueError: there are no levels, a feature has less than 2, or there are more codes than
                int32 has numbers.
        """
        levels = tuple(levels)
        if not levels or not all(is_integer(n) and n >= 2 for n in levels):
            raise ValueError(f"FSQ: levels={levels!r} must be integers of at least 2, one or more")
        levels = integers(levels)
        num_codes = math.prod(levels)
        if num_codes >= 2**31:
            raise ValueError(
                f"FSQ: levels={levels!r} make {num_codes} codes; int32 has numbers for less than "
                "2**31. Split the features over several layers"
            )
        self.levels = levels
        self.num_codes = num_codes

    @promoting
    def __call__(self, z: jax.Array, *, mask: jax.Array | None = None) -> Quantized:
        """Quantizes vectors.

        Args:
            z: array of shape (..., len(levels)), float.
            mask: bool array of shape (...), false for padding; as for `VectorQuantizer`.

        Returns:
            A `Quantized`, whose loss is 0. Codes are numbered with the level of the first feature
            running fastest. A vector with NaN in it has the number num_codes.

        Raises:
            TypeError: z is not a floating array, or mask not one of bool.
            ValueError: z has another number of features, or mask another shape.
        """
        z = check_vectors("FSQ", z, len(self.levels))
        mask = check_mask("FSQ", mask, z)
        # Of 0 the value is 0, so that of padding is too.
        z = where_mask(mask, z)
        levels = _rounded(lax.stop_gradient(z), self.levels)
        numbers = levels.astype(jnp.int32) + _half(self.levels)
        indices = jnp.sum(numbers * self._strides(), -1, dtype=jnp.int32)
        indices = where_vector(mask, levels, indices, self.num_codes)
        values = round_to_levels(z, self.levels)
        loss = jnp.zeros((), jnp.float32)
        return Quantized(values, indices, loss, *measure_usage(indices, self.num_codes))

    @promoting
    def indices_to_codes(self, indices: jax.Array) -> jax.Array:
        """The codes that have certain numbers.

        Args:
            indices: integers of any shape, from 0 to num_codes - 1.

        Returns:
            Array of shape (*indices.shape, len(levels)), float32; NaN where no code has the number.
        """
        indices = jnp.asarray(indices)
        numbers = indices[..., None] // self._strides() % np.array(self.levels, np.int32)
        codes = (numbers - _half(self.levels)) / _half(self.levels).astype(np.float32)
        return where_code(indices, self.num_codes, codes)

    def _strides(self) -> np.ndarray:
        """What one level of each feature adds to the number of a code."""
        return np.cumprod((1, *self.levels[:-1]), dtype=np.int32)
