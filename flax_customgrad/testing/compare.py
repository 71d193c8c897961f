"""`Comparison`: one gradient, how it is computed, and what it should be."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_customgrad.testing.problem import Gradient

Fn = Callable[..., Any]

TOGETHER = "together"
"""The program that computes every expected value, and what runs on one device."""

SHARD_MAP = "shard_map"
"""The program of what runs on several devices."""

ALONE = "alone"
"""Of no program: what runs eagerly, or makes a program of its own."""


class Comparison(NamedTuple):
    """One gradient to compare.

    Attributes:
        case: which variant of the check.
        run: computes the gradient of a function of the problem's arguments: of the function under
            test; and, where that fails, of the reference, to see whether JAX can do it at all.
        expected: computes the expected gradient.
        of: the names of what is compared, or one for all; by default each argument that has a
            gradient.
        program: the compiled program in which it runs, shared with others.
        tolerance: from an expected array, the error allowed relative to its largest value; by
            default that of the dtype.
        limit: like `tolerance`, the error allowed where errors add up on the way: where the
            reference, run in the same way, is off by more than the tolerance as well, or `adds_up`.
        adds_up: whether they do.
        is_forward: whether it takes a derivative in forward mode, which JAX may refuse only when
            the program is compiled.
    """

    case: str
    run: Callable[[Fn], Gradient]
    expected: Callable[[], Gradient]
    of: Sequence[str] | str | None = None
    program: str = TOGETHER
    tolerance: Callable[[np.ndarray], float] | None = None
    limit: Callable[[np.ndarray], float] | None = None
    adds_up: Callable[[], bool] = lambda: False
    is_forward: bool = False


class Skip(Exception):
    """A case cannot be run here; its text says why."""
