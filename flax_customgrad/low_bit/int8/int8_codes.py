"""int8 codes: an array as integers in [-127, 127] and the scales that they are multiples of.

    s     = max |x| / 127      the maximum over the axes that share a scale
    q     = round(x / s)       halves to the even integer
          | floor(x / s + u)   stochastic, u uniform in [0, 1): on average x / s, arXiv:1502.02551
    x_hat = q s

127 is what torchao divides by. qwix and AQT divide by 127.5, half a step above the largest code,
which they clip: their largest element comes back as 0.996 of itself, ours as itself. -128 is no
code, so that -x has the codes of x with the other sign.

The scale of an axis of zeros is the smallest normal number, which gives zeros back. An axis with an
element that is not finite has a scale that is not, and so has everything computed from it.

Codes are multiplied in int8 and summed in int32, which holds 133 144 products of 127 x 127. float32
holds every code, and 1040 such products exactly: where floats are faster, or int32 would not hold
the sum, they are multiplied, and a longer sum is rounded as any sum of floats is.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.contract.residual_storage import keep_for_second_order, with_derivative_of
from flax_customgrad.numerics.by_platform import by_platform
from flax_customgrad.numerics.dtypes import in_dtype, widened
from flax_customgrad.numerics.scaling import quotient
from flax_customgrad.numerics.sizes import is_known

LARGEST_CODE = 127


class Int8Array(NamedTuple):
    """An array in int8.

    Attributes:
        codes: q, int8 array of its shape.
        scale: s, what a code is a multiple of, float32 or wider; of its shape, 1 along the axes
            that share a scale.
        original: the array itself, which derivatives of what is computed from the codes run
            through, and nothing else reads; None where there can be none.
    """

    codes: jax.Array
    scale: jax.Array
    original: jax.Array | None

    def values(self, dtype: Any) -> jax.Array:
        """x_hat, with the derivative of the original: the straight-through estimator.

        Args:
            dtype: dtype of the result.
        """
        return self._with_derivative(self.codes.astype(self.scale.dtype) * self.scale, dtype, 1)

    def multiples(self, dtype: Any) -> jax.Array:
        """The codes as floats, with the derivative of the original divided by the scale.

        Args:
            dtype: dtype of the result.
        """
        return self._with_derivative(self.codes, dtype, self.scale)

    def _with_derivative(self, decoded: jax.Array, dtype: Any, scale: Any) -> jax.Array:
        decoded = in_dtype(decoded, dtype)
        if self.original is None:
            return decoded
        return with_derivative_of(decoded, in_dtype(self.original / scale, dtype))


def encode_int8(x: jax.Array, axes: Any, key: jax.Array | None = None) -> Int8Array:
    """Quantizes an array.

    Args:
        x: array of any shape, float.
        axes: the axes that share a scale; None for all.
        key: a key of `jax.random` to round stochastically; None to round to the nearest.
    """
    (wide,) = widened(x.dtype, lax.stop_gradient(x))
    largest = jnp.max(jnp.abs(wide), axes, keepdims=True, initial=0)
    # Not largest / LARGEST_CODE, nor wide / scale: in some programs XLA multiplies by the inverse,
    # and codes that were packed in another one would differ.
    step = quotient(largest, jnp.asarray(LARGEST_CODE, wide.dtype))
    scale = jnp.maximum(step, jnp.finfo(wide.dtype).tiny)
    steps = quotient(wide, scale)
    if key is None:
        q = jnp.round(steps)
    else:
        # Not floor(steps + u): that sum is rounded, and ends above too often.
        below = jnp.floor(steps)
        up = jax.random.uniform(key, x.shape, wide.dtype) < steps - below
        # Of the largest element the quotient may exceed 127 by its rounding.
        q = jnp.clip(below + up, -LARGEST_CODE, LARGEST_CODE)
    return Int8Array(q.astype(jnp.int8), scale, keep_for_second_order(x))


def sum_products(
    multiply: Callable[..., jax.Array],
    *codes: jax.Array,
    terms: int,
    wide: Any,
    in_float_on: Sequence[str] = (),
) -> jax.Array:
    """Multiplies two arrays of codes and adds the products up.

    Args:
        multiply: a function of a dtype and of two arrays, which sums in that dtype: in int32 of
            int8, or in `wide` of floats.
        *codes: two int8 arrays.
        terms: how many products make a sum; floats are multiplied where that is symbolic.
        wide: dtype of the result, float32 or float64.
        in_float_on: the platforms on which floats are multiplied.
    """

    def in_int8(*codes: jax.Array) -> jax.Array:
        return multiply(jnp.int32, *codes).astype(wide)

    def in_float(*codes: jax.Array) -> jax.Array:
        return multiply(wide, *(a.astype(wide) for a in codes))

    if not is_known(terms) or terms > (2**31 - 1) // LARGEST_CODE**2:
        return in_float(*codes)
    if not in_float_on:
        return in_int8(*codes)
    return by_platform(*codes, default=in_int8, **dict.fromkeys(in_float_on, in_float))


def is_exact_in_float(terms: int, wide: Any) -> bool:
    """Whether floats hold a sum of products of codes exactly.

    Args:
        terms: how many products make the sum.
        wide: float32 or float64.
    """
    return terms * LARGEST_CODE**2 <= 2 ** (jnp.finfo(wide).nmant + 1)
