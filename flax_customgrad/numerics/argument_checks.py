"""Numbers that must be positive: a slope, a temperature, a bound on where a gradient passes."""

import math
from typing import Any

import numpy as np

from flax_customgrad.contract.compat import is_traced


def positive(layer: str, name: str, value: Any) -> Any:
    """A number, or an array of numbers, that must be positive and finite.

    Args:
        layer: the name of the layer, for the error.
        name: the name of the argument.
        value: a number or an array; or a traced one, which cannot be looked at.

    Raises:
        ValueError: a number is not positive, or not finite.
    """
    if is_traced(value):
        return value
    numbers = np.asarray(value)
    if not np.all((numbers > 0) & (numbers < math.inf)):
        raise ValueError(f"{layer}: {name}={value!r} must be positive and finite")
    return value


def bound(layer: str, clip_value: float | None) -> float | None:
    """A bound on where a gradient passes; None where it passes everywhere.

    Args:
        layer: the name of the layer, for the error.
        clip_value: the bound.

    Raises:
        ValueError: the bound is not positive.
    """
    if clip_value is not None and not clip_value > 0:
        raise ValueError(
            f"{layer}: clip_value={clip_value!r} must be positive; None lets the gradient pass "
            "everywhere"
        )
    return clip_value
