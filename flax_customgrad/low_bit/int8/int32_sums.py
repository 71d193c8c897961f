"""Sums of products of int8 codes.

int8 is multiplied in int8 and summed in int32, which holds 133 144 products of 127 x 127. float32
holds every code, and 1040 such products exactly: where floats are faster, or int32 would not hold
the sum, they are multiplied, and a longer sum is rounded as any sum of floats is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_customgrad.low_bit.int8.int8_codes import LARGEST


def summed(
    multiply: Callable[..., jax.Array],
    *codes: jax.Array,
    terms: int,
    wide: Any,
    in_float_on: Sequence[str] = (),
) -> jax.Array:
    """Multiplies codes and adds up.

    Args:
        multiply: a function of a dtype and of two arrays, which sums in that dtype: in int32 of
            int8, or in `wide` of floats.
        *codes: two int8 arrays.
        terms: how many products make a sum.
        wide: dtype of the result, float32 or float64.
        in_float_on: the platforms on which floats are multiplied.
    """

    def in_int8(*codes: jax.Array) -> jax.Array:
        return multiply(jnp.int32, *codes).astype(wide)

    def in_float(*codes: jax.Array) -> jax.Array:
        return multiply(wide, *(a.astype(wide) for a in codes))

    if terms > (2**31 - 1) // LARGEST**2:
        return in_float(*codes)
    if not in_float_on:
        return in_int8(*codes)
    return lax.platform_dependent(*codes, default=in_int8, **dict.fromkeys(in_float_on, in_float))


def is_exact(terms: int, wide: Any) -> bool:
    """Whether floats hold a sum of so many products exactly.

    Args:
        terms: how many.
        wide: float32 or float64.
    """
    return terms * LARGEST**2 <= 2 ** (jnp.finfo(wide).nmant + 1)
