"""`faster_on_one_cpu`: a computation that is right for most numbers, and tells where it is not.

XLA on a CPU computes some functions of rows fast, as softmax, if they are written plainly; what
makes them right for all numbers would stop that. Where no number can be told from a wrong one, the
plain computation runs, one element of each row is looked at, and where it is no number all is
computed again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_customgrad.numerics.everywhere import everywhere
from flax_customgrad.numerics.platform import pays_to_branch


def _is_large(x: jax.Array) -> bool:
    return pays_to_branch(x.size)


def faster_on_one_cpu(
    fast: Callable[..., Any], pays: Callable[[jax.Array], bool] = _is_large
) -> Callable[..., Any]:
    """Evaluates a function by another one on one CPU, where that is right; its derivatives stay.

    Args:
        fast: called like the function, with something static, a large array and others; it returns
            whether it is wrong, a bool, and what the function returns.
        pays: whether it pays for such an array: to compile both takes 0.1 s.

    Returns:
        A decorator.
    """

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
        def evaluated(static: Any, x: jax.Array, *others: Any) -> Any:
            if not pays(x):
                return function(static, x, *others)
            # A loop that turns once if at all: what a branch hands through may be copied.
            is_wrong, out = fast(static, x, *others)
            _, out = lax.while_loop(
                lambda state: state[0],
                lambda _: (jnp.zeros_like(is_wrong), function(static, x, *others)),
                (is_wrong, out),
            )
            return out

        @evaluated.defjvp
        def _jvp(static: Any, primals: Any, tangents: Any) -> Any:
            return jax.jvp(functools.partial(function, static), primals, tangents)

        return evaluated

    return decorator


def has_no_number(y: jax.Array, axis: int | tuple[int, ...] | None) -> jax.Array:
    """Whether the first element of any row is no number.

    Args:
        y: array of any shape, float.
        axis: the axes of a row; None for all.
    """
    of_rows = range(y.ndim) if axis is None else np.atleast_1d(axis) % y.ndim
    first = y[tuple(slice(0, 1) if i in of_rows else slice(None) for i in range(y.ndim))]
    infinity = first.dtype.type(np.inf)
    return lax.bitwise_not(everywhere(lax.le(first, infinity), lax.ge(first, -infinity)))
