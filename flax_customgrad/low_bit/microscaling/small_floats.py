"""Floats of 4 and 8 bits: rounding to them, and their codes.

    E4M3  8 bits, largest 448     E5M2  8 bits, largest 57344     E2M1  4 bits, largest 6

    round    step = 2^(max(floor(log2 |v|), e) - m),  m bits of mantissa, 2^e the smallest normal
             nearest:     step rint(v / step), halves to the even code
             stochastic:  step floor(v / step), or with probability v / step - floor(v / step) the
                          value above it, so that the mean is v
    beyond   the largest value: that value, with its sign
    NaN      NaN

Every step is a power of two, so nothing but the rounding itself is inexact. A value that is rounded
is cast to the dtype of the elements exactly, and the bits of that are its code. (A cast alone
rounds to nearest as well, but not at random; NumPy's rounds float64 twice.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

E4M3, E5M2, E2M1 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn


def round_to(element: Any, v: jax.Array, noise: jax.Array | None = None) -> jax.Array:
    """Rounds to the values that elements can have; larger ones saturate.

    Args:
        element: E4M3, E5M2 or E2M1.
        v: array of any shape, float32 or float64.
        noise: uniform in [0, 1), of the same shape, to round at random; None for the nearest.

    Returns:
        Array like v.
    """
    limits = jnp.finfo(element)
    v = jnp.clip(v, -float(limits.max), float(limits.max))
    step = jnp.maximum(octave(v), 2.0**limits.minexp) * 2.0**-limits.nmant
    steps = v / step
    if noise is None:
        return jnp.round(steps) * step
    below = jnp.floor(steps)
    return (below + (noise < steps - below)) * step


def encode_elements(element: Any, values: jax.Array) -> jax.Array:
    """The codes of values that elements can have.

    Args:
        element: E4M3, E5M2 or E2M1.
        values: array of any shape, float; what `round_to` returned.

    Returns:
        uint8 array of that shape; 4-bit codes are below 16.
    """
    return lax.bitcast_convert_type(values.astype(element), _integer(element)).astype(jnp.uint8)


def decode_elements(element: Any, codes: jax.Array, dtype: Any) -> jax.Array:
    """The values of codes.

    Args:
        element: E4M3, E5M2 or E2M1.
        codes: uint8 array of any shape.
        dtype: a floating dtype, float32 or wider.

    Returns:
        Array of that shape and dtype.
    """
    return lax.bitcast_convert_type(codes.astype(_integer(element)), element).astype(dtype)


def octave(v: jax.Array) -> jax.Array:
    """The power of two up to |v|: v with neither sign nor mantissa.

    Args:
        v: array of any shape, float32 or float64.

    Returns:
        Array like v; 0 for 0 and what is below the normal numbers, inf where v is not finite.
    """
    limits = jnp.finfo(v.dtype)
    integer = jnp.dtype(f"uint{limits.bits}")
    exponent = jnp.array((1 << (limits.bits - 1)) - (1 << limits.nmant), integer)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(v, integer) & exponent, v.dtype)


def _integer(element: Any) -> Any:
    return jnp.dtype(f"uint{jnp.finfo(element).bits}")
