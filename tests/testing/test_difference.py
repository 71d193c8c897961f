"""How far an array is from what it should be, and what is not finite."""

import numpy as np
import pytest

from flax_customgrad.testing.difference import not_finite, relative_error

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [1.0, 2.0], 0.5),
        ([1e-9, 0.0], [0.0, 0.0], 1e-9),
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([INF, 1.0], [INF, 1.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_relative_error(got, expected, error):
    assert relative_error(np.array(got), np.array(expected)) == pytest.approx(error)
    assert not_finite(np.array(got), np.array(expected)) == ""


@pytest.mark.parametrize(
    ("got", "expected", "text"),
    [
        (NAN, 0.25, "is NaN, expected 0.25"),
        ([[0.0, 1.0], [INF, 2.0]], [[0.0, 1.0], [3.0, 2.0]], "is inf at [1, 0], expected 3"),
        ([INF], [-INF], "is inf at [0], expected -inf"),
        ([0.5, NAN, NAN], [NAN, 0.0, 1.0], "is 0.5 at [0], expected NaN (3 such values of 3)"),
    ],
)
def test_what_is_not_finite_is_called_so_with_its_place(got, expected, text):
    assert not_finite(np.array(got), np.array(expected)) == text
