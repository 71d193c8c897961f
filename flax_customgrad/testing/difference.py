"""How far an array is from what it should be."""

import numpy as np


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference relative to the largest expected value.

    Values that are not finite agree where they are equal, NaN with NaN; where one is not finite
    and they do not agree, the error is inf.

    Args:
        got: array of any shape, float64.
        expected: array of that shape, float64.
    """
    if got.size == 0:
        return 0.0
    differ = ~_agree(got, expected)
    if not (np.isfinite(got[differ]).all() and np.isfinite(expected[differ]).all()):
        return float("inf")
    difference = np.abs(got[differ] - expected[differ]).max(initial=0.0)
    finite = np.abs(expected[np.isfinite(expected)])
    scale = finite.max(initial=0.0)
    return float(difference / scale) if scale else float(difference)


def not_finite(got: np.ndarray, expected: np.ndarray) -> str:
    """Says where the first value is that should be finite and is not, or the reverse.

    Args:
        got: array of any shape, float64.
        expected: array of that shape, float64.

    Returns:
        Such as "is NaN at [2, 0], expected 0.25"; empty where there is no such value.
    """
    wrong = ~_agree(got, expected) & ~(np.isfinite(got) & np.isfinite(expected))
    if not wrong.any():
        return ""
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    where = f" at {list(index)}" if index else ""
    more = f" ({wrong.sum()} such values of {wrong.size})" if wrong.sum() > 1 else ""
    return f"is {_word(got[index])}{where}, expected {_word(expected[index])}{more}"


def _agree(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return (got == expected) | (np.isnan(got) & np.isnan(expected))


def _word(value: float) -> str:
    return "NaN" if np.isnan(value) else f"{value:.3g}"
