"""int8 codes: an array as integers in [-127, 127] and the scales that they are multiples of.

    s  = max |x| / 127      the maximum over the axes that share a scale
    q  = round(x / s)       halves to the even integer
       | floor(x / s + u)   stochastic, u uniform in [0, 1): on average x / s, arXiv:1502.02551
    x^ = q s

127 is what torchao divides by. qwix and AQT divide by 127.5, half a step above the largest code,
which they clip: their largest element comes back as 0.996 of itself, ours as itself. -128 is no
code, so that -x has the codes of x with the other sign.

The scale of an axis of zeros is the smallest normal number, which gives zeros back. An axis with an
element that is not finite has a scale that is not, and so has everything computed from it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.contract.residual_storage import (
    keep_for_second_order,
    with_derivative_of,
)
from flax_customgrad.low_bit.quantizers.scheme import quotient
from flax_customgrad.numerics.dtypes import in_dtype, widened

LARGEST = 127


class Int8(NamedTuple):
    """An array in int8.

    Attributes:
        codes: int8 array of its shape.
        scale: what a code is a multiple of, float32 or wider; of its shape, 1 along the axes that
            share a scale.
        original: the array itself, which derivatives of what is computed from the codes run
            through, and nothing else reads; None where there can be none.
    """

    codes: jax.Array
    scale: jax.Array
    original: jax.Array | None

    def values(self, dtype: Any) -> jax.Array:
        """The array again, with the derivative of the original: the straight-through estimator.

        Args:
            dtype: dtype of the result.
        """
        return self._standing(self.codes.astype(self.scale.dtype) * self.scale, dtype, 1)

    def multiples(self, dtype: Any) -> jax.Array:
        """The codes as floats, with the derivative of the original divided by the scale.

        Args:
            dtype: dtype of the result.
        """
        return self._standing(self.codes, dtype, self.scale)

    def _standing(self, decoded: jax.Array, dtype: Any, scale: Any) -> jax.Array:
        decoded = in_dtype(decoded, dtype)
        if self.original is None:
            return decoded
        return with_derivative_of(decoded, in_dtype(self.original / scale, dtype))


def encode(x: jax.Array, axes: Any, key: jax.Array | None = None) -> Int8:
    """Quantizes an array.

    Args:
        x: array of any shape, float.
        axes: the axes that share a scale; None for all.
        key: a key of `jax.random` to round stochastically; None to round to the nearest.
    """
    (wide,) = widened(x.dtype, lax.stop_gradient(x))
    largest = jnp.max(jnp.abs(wide), axes, keepdims=True, initial=0)
    # Not largest / LARGEST, nor wide / scale: in some programs XLA multiplies by the inverse, and
    # codes that were packed in another one would differ.
    step = quotient(largest, jnp.asarray(LARGEST, wide.dtype))
    scale = jnp.maximum(step, jnp.finfo(wide.dtype).tiny)
    steps = quotient(wide, scale)
    if key is None:
        q = jnp.round(steps)
    else:
        # Not floor(steps + noise): that sum is rounded, and ends above too often.
        below = jnp.floor(steps)
        up = jax.random.uniform(key, x.shape, wide.dtype) < steps - below
        # Of the largest element the quotient may exceed 127 by its rounding.
        q = jnp.clip(below + up, -LARGEST, LARGEST)
    return Int8(q.astype(jnp.int8), scale, keep_for_second_order(x))
