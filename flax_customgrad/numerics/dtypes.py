"""Dtypes: which arrays a hand-written backward takes, and in what dtype it computes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.contract import autodiff

_HALF = (jnp.bfloat16, jnp.float16)
_SUPPORTED = (*_HALF, jnp.float32, jnp.float64)


def as_array(x: Any) -> Any:
    """An array of NumPy or a Variable as an array of JAX; anything else as it is."""
    return jnp.asarray(x) if isinstance(x, np.ndarray | np.generic | nnx.Variable) else x


def is_python_number(p: Any) -> bool:
    """Whether a parameter is a Python number: weakly typed, and without a gradient."""
    return type(p) in (int, float)


def takes_custom_backward(*arrays: Any) -> bool:
    """Whether the hand-written backwards apply: to real floating arrays, outside `use_autodiff`.

    Integers, complex numbers, 8-bit floats, lists and the like are left to `jax.nn`, with its
    results and its errors.
    """
    return not autodiff.in_use() and all(map(is_supported_float, arrays))


def is_supported_float(a: Any) -> bool:
    """Whether something is a real floating array, of a dtype that the backwards are written for."""
    return isinstance(a, jax.Array) and a.dtype in _SUPPORTED


def is_half(*arrays: Any) -> bool:
    """Whether arrays promote to a dtype of half precision."""
    return jnp.result_type(*arrays) in _HALF


def in_dtype(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts an array to a dtype; one that has it already keeps its weak type."""
    return x if x.dtype == dtype else x.astype(dtype)


def widened(dtype: Any, *arrays: jax.Array) -> list[jax.Array]:
    """Casts arrays for a computation in float32 or wider, whose result is then rounded to a dtype.

    Args:
        dtype: dtype of the result.
        *arrays: arrays of any shape.

    Returns:
        The floating arrays in that dtype or float32, whichever is wider; masks as they are.
    """
    wide = jnp.result_type(jnp.float32, dtype)
    return [in_dtype(a, wide) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays]
