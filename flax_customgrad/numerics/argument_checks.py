"""Checks of the arguments of constructors and functions: what is wrong with one, and what is right.

Each takes the name of the layer and that of the argument, which its error names.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from flax_customgrad.contract.compat import is_traced


def check_positive(layer: str, argument: str, value: Any) -> Any:
    """Refuses a number, or an array of numbers, that is not positive and finite.

    Args:
        layer: the name of the layer, for the error.
        argument: the name of the argument, for the error.
        value: a number or an array; or a traced one, whose value is not known.

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


def check_size(layer: str, argument: str, value: Any) -> None:
    """Refuses a size that is no positive integer.

    Args:
        layer: the name of the layer, for the error.
        argument: the name of the argument, for the error.
        value: the size.

    Raises:
        ValueError: the size is no integer, or below 1.
    """
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{layer}: {argument}={value!r} must be an integer of at least 1")


def check_clip_value(layer: str, clip_value: float | None) -> float | None:
    """Refuses a bound on where a gradient passes that is not positive.

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
    """Refuses a word that is not one of those an argument may be.

    Args:
        layer: the name of the layer, for the error.
        argument: the name of the argument, for the error.
        value: what was given.
        words: what may be given.

    Raises:
        ValueError: the value is none of the words.
    """
    words = tuple(words)
    if value not in words:
        raise ValueError(f"{layer}: {argument}={value!r} is none of {', '.join(map(repr, words))}")


def check_bits(layer: str, bits: Any, least: int = 2) -> int:
    """Refuses a number of bits that is no integer, or too small or large for a code in a byte.

    Args:
        layer: the name of the layer, for the error.
        bits: the number.
        least: how few there may be.

    Returns:
        The number.

    Raises:
        ValueError: it is no integer from the least to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not least <= bits <= 8:
        raise ValueError(f"{layer}: bits={bits!r} must be an integer from {least} to 8")
    return bits
