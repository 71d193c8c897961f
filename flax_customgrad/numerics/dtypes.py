"""Dtypes: which arrays a hand-written backward takes, and in what dtype it computes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.contract import autodiff
from flax_customgrad.numerics.accumulation import accumulator

_HALF = (jnp.bfloat16, jnp.float16)
_SUPPORTED = (*_HALF, jnp.float32, jnp.float64)


def as_array(x: Any) -> Any:
    """An array of NumPy or a Variable as an array of JAX; anything else as it is."""
    if isinstance(x, jax.Array):
        return x
    return jnp.asarray(x) if isinstance(x, np.ndarray | np.generic | nnx.Variable) else x


def is_python_number(p: Any) -> bool:
    """Whether a parameter is a Python number: weakly typed, and without a gradient."""
    return type(p) in (int, float)


def takes_custom_backward(*arrays: Any, dtype: Any = None) -> bool:
    """Whether the hand-written backwards apply: to real floating arrays, outside `use_autodiff`.

    Integers, complex numbers, 8-bit floats, lists and the like are left to flax.nnx and `jax.nn`,
    with their results and their errors. So are arrays of several dtypes where JAX is to refuse to
    promote them.

    Args:
        *arrays: the inputs, and the parameters of a layer.
        dtype: dtype of the computation, or None where that is what the arrays promote to.
    """
    if autodiff.in_use() or not all(map(is_supported_float, arrays)):
        return False
    if dtype is not None:
        return is_supported_dtype(dtype)
    strict = jax.numpy_dtype_promotion.value == "strict"
    return not strict or len({a.dtype for a in arrays}) <= 1


def is_supported_float(a: Any) -> bool:
    """Whether something is a real floating array, of a dtype that the backwards are written for."""
    return isinstance(a, jax.Array) and a.dtype in _SUPPORTED


def is_supported_dtype(dtype: Any) -> bool:
    """Whether a dtype is one that the backwards are written for."""
    return jnp.dtype(dtype) in _SUPPORTED


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
        *arrays: arrays of any shape, and numbers.

    Returns:
        The floating arrays in that dtype or float32, whichever is wider; masks as they are.
    """
    wide, arrays = accumulator(dtype), tuple(map(jnp.asarray, arrays))
    return [in_dtype(a, wide) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arrays]
