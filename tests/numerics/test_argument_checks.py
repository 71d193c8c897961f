"""What the checks of arguments refuse, and that their errors name the layer and the argument."""

import jax
import numpy as np
import pytest

from flax_customgrad.numerics.argument_checks import (
    check_bits,
    check_clip_value,
    check_nonnegative,
    check_positive,
    check_size,
    check_word,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("check", "right", "wrong", "error"),
    [
        (
            check_positive,
            [1, 0.5, np.ones(2)],
            [0, -1.0, NAN, INF, np.zeros(2)],
            "positive and fin",
        ),
        (check_nonnegative, [0, 0.5], [-1, NAN, INF], "a number of at least 0"),
        (check_size, [1, 7], [0, -1, 2.0, None], "an integer of at least 1"),
    ],
    ids=lambda case: getattr(case, "__name__", None),
)
def test_numbers(check, right, wrong, error):
    for value in right:
        check("Layer", "size", value)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^Layer: size=.* must be {error}"):
            check("Layer", "size", value)


def test_a_traced_number_is_taken_as_it_is():
    assert jax.jit(lambda value: check_positive("Layer", "slope", value))(-1.0) == -1


def test_bits_words_and_bounds():
    assert check_bits("Layer", 2) == 2
    assert check_bits("Layer", 1, least=1) == 1
    for bits in (1, 9, True, 4.0):
        with pytest.raises(ValueError, match=r"Layer: bits=.* must be an integer from 2 to 8"):
            check_bits("Layer", bits)
    assert check_clip_value("Layer", None) is None
    assert check_clip_value("Layer", 0.5) == 0.5
    for bound in (0, -1.0, NAN):
        with pytest.raises(ValueError, match=r"clip_value=.* must be positive; None lets the gra"):
            check_clip_value("Layer", bound)
    check_word("Layer", "reset", "zero", ("zero", "none"))
    with pytest.raises(ValueError, match=r"Layer: reset='off' is none of 'zero', 'none'"):
        check_word("Layer", "reset", "off", iter(("zero", "none")))
