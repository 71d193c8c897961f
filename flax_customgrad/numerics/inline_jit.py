"""`inline_jit`: compiles a function that is called outside of a jit; inside one it does nothing."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])


def inline_jit(*, static_argnums: int | tuple[int, ...] = 0) -> Callable[[F], F]:
    """Compiles a function for calls outside of any jit, so that no intermediate array is stored.

    Inside of a jit its operations become those of the caller, as if it were not decorated.

    Args:
        static_argnums: which arguments are hashable constants.

    Returns:
        A decorator.
    """
    return functools.partial(jax.jit, static_argnums=static_argnums, inline=True)  # type: ignore[return-value]
