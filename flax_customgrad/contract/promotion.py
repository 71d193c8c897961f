"""Promotion inside the library's own operations, whatever a user has JAX refuse.

`jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"` let a user find
promotions in a model. Those inside an operation, where a backward sums in float32 or a statistic
meets its input, are meant; so they are allowed there, and only there.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

F = TypeVar("F", bound=Callable[..., Any])


def promoting(function: F) -> F:
    """A function that promotes dtypes and ranks as JAX does by default.

    Args:
        function: the function of an operation, its forward or its backward; or one that prepares
            what an operation takes, such as the search for the nearest code.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        dtypes, ranks = jax.numpy_dtype_promotion.value, jax.numpy_rank_promotion.value
        if (dtypes, ranks) == ("standard", "allow"):
            return function(*args, **kwargs)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return cast(F, call)
