"""Sizes that `jax.export` may leave symbolic, and what can be said of them."""

from typing import Any


def is_known(size: Any) -> bool:
    """Whether a size is a number; a symbolic one compares with few others.

    Args:
        size: an int, or a symbolic dimension of `jax.export`.
    """
    return isinstance(size, int)


def at_least_one(size: Any) -> Any:
    """`max(1, size)`; a symbolic size is at least 1, as JAX takes it to be.

    Args:
        size: an int, or a symbolic dimension of `jax.export`.
    """
    return max(1, size) if is_known(size) else size
