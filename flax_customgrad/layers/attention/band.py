"""The band of keys that a query sees, by place: causal attention and sliding windows.

    query i sees key j   where   i - left <= j <= i + right

A bound of None is no bound. Causal attention is right = 0. Places are counted from the front of
queries and keys alike, as in flax.nnx, also where there are more of one than of the other.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.numerics.argument_checks import is_integer

Window = int | tuple[int | None, int | None] | None
"""How many keys a query sees before and behind its own place; an integer counts for both."""


@dataclass(frozen=True)
class Band:
    """The keys that a query sees.

    Attributes:
        left: how many before the query's own place; None for all.
        right: how many behind it; None for all.
    """

    left: int | None = None
    right: int | None = None

    @classmethod
    def of(cls, window: Any, is_causal: bool) -> "Band":
        """The band of a window and of causality.

        Args:
            window: an integer, a pair of integers or None, or None.
            is_causal: whether a query sees no key behind its own place.

        Raises:
            ValueError: the window is none of these, or negative.
        """
        pair = tuple(window) if isinstance(window, tuple | list) else (window, window)
        if len(pair) != 2 or not all(n is None or (is_integer(n) and n >= 0) for n in pair):
            raise ValueError(
                f"dot_product_attention: window={window!r} must be the number of keys that a query "
                "sees on each side of its own place, or a pair (left, right) of such numbers, in "
                "which None is no bound"
            )
        left, right = (None if n is None else int(n) for n in pair)
        return cls(left, 0 if is_causal else right)

    @property
    def is_everything(self) -> bool:
        """Whether a query sees every key."""
        return self.left is None and self.right is None

    def keys(self, start: int, stop: int, n_keys: int) -> tuple[int, int]:
        """The range of keys that some of the queries from `start` to `stop` see.

        Returns:
            The first key, and the one behind the last; no more than the first where there is none.
        """
        first = 0 if self.left is None else max(start - self.left, 0)
        last = n_keys if self.right is None else min(stop + self.right, n_keys)
        return first, last

    def sees(self, queries: Any, keys: Any) -> jax.Array | bool:
        """Whether a query sees a key; True where there are no bounds.

        Args:
            queries: places, an integer array.
            keys: places, an integer array that broadcasts against it.
        """
        seen = True
        if self.left is not None:
            seen = keys >= queries - self.left
        if self.right is not None:
            seen = jnp.logical_and(seen, keys <= queries + self.right)
        return seen
