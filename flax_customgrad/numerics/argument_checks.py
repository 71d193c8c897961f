"""Checks of the arguments of constructors and functions.

Each check takes the name of the layer. Its error names the layer, the argument and what is allowed.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from flax_customgrad.contract.compat import is_traced


def is_integer(value: Any) -> bool:
    """Whether a value is one integer, of Python, NumPy or JAX; True and False are none."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def integers(value: Any) -> tuple[int, ...]:
    """One integer or several, of Python, NumPy or JAX, as a tuple of Python's.

    Args:
        value: an integer, or an iterable of them, such as an array.

    Raises:
        TypeError: it is neither.
    """
    return tuple(map(operator.index, value if np.iterable(value) else (value,)))


def check_positive(layer: str, argument: str, value: Any) -> Any:
    """Refuses a number, or an array of numbers, that is not positive and finite.

    Args:
        layer: the name of the layer, for the error.
        argument: the name of the argument, for the error.
        value: a number, or an array of any shape; a traced one is not checked.

    Returns:
        The value.

    Raises:
        ValueError: a number is not positive, or not finite.
    """
    if is_traced(value):
        return value
    numbers = np.asarray(value)
    if not np.all((numbers > 0) & (numbers < math.inf)):
        raise ValueError(f"{layer}: {argument}={value!r} must be positive and finite")
    return value


def check_nonnegative(layer: str, argument: str, value: float) -> None:
    """Refuses a number that is negative, infinite or NaN.

    Args:
        layer: the name of the layer, for the error.
        argument: the name of the argument, for the error.
        value: a number.

    Raises:
        ValueError: the number is negative, infinite or NaN.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{layer}: {argument}={value!r} must be a number of at least 0")


def check_size(layer: str, argument: str, value: Any) -> int:
    """Refuses a size that is not a positive integer.

    Args:
        layer: the name of the layer, for the error.
        argument: the name of the argument, for the error.
        value: the size, an integer of Python, NumPy or JAX.

    Returns:
        The size, as one of Python.

    Raises:
        ValueError: the size is not an integer, or below 1.
    """
    if not is_integer(value) or value < 1:
        raise ValueError(f"{layer}: {argument}={value!r} must be an integer of at least 1")
    return operator.index(value)


def check_clip_value(layer: str, clip_value: float | None) -> float | None:
    """Refuses a `clip_value`, the bound within which a gradient passes, that is not positive.

    Args:
        layer: the name of the layer, for the error.
        clip_value: the bound; None where the gradient passes everywhere.

    Returns:
        The bound.

    Raises:
        ValueError: the bound is not positive.
    """
    if clip_value is not None and not clip_value > 0:
        raise ValueError(
            f"{layer}: clip_value={clip_value!r} must be positive; None lets the gradient pass "
            "everywhere"
        )
    return clip_value


def check_word(layer: str, argument: str, value: Any, words: Iterable[str]) -> None:
    """Refuses a word that is not among the allowed ones.

    Args:
        layer: the name of the layer, for the error.
        argument: the name of the argument, for the error.
        value: the argument.
        words: the allowed values.

    Raises:
        ValueError: the value is not one of the words.
    """
    words = tuple(words)
    if value not in words:
        raise ValueError(f"{layer}: {argument}={value!r} is none of {', '.join(map(repr, words))}")


def check_bits(layer: str, bits: Any, least: int = 2, most: int = 8) -> int:
    """Refuses a number of bits that is not an integer, or too few or too many.

    Args:
        layer: the name of the layer, for the error.
        bits: the number of bits, an integer of Python, NumPy or JAX.
        least: the smallest number allowed.
        most: the largest number allowed; up to 8 a code fits a byte.

    Returns:
        The number of bits, as an integer of Python.

    Raises:
        ValueError: `bits` is not an integer from `least` to `most`.
    """
    if not is_integer(bits) or not least <= bits <= most:
        raise ValueError(f"{layer}: bits={bits!r} must be an integer from {least} to {most}")
    return operator.index(bits)
