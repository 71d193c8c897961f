"""The formulas of docstrings, as the documentation typesets them."""

import re
import runpy
import xml.dom.minidom
from pathlib import Path

import pytest

import flax_customgrad

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "docs/ext")  # where Sphinx finds the modules that it imports
    MATHEMATICS = runpy.run_path(str(ROOT / "docs/ext/mathematics.py"))
formula, table = MATHEMATICS["formula"], MATHEMATICS["table"]


def _text(markup):
    """What remains of a formula without its elements, apart from fractions and scripts."""
    markup = re.sub(r"<mfrac>", "FRAC", markup)
    markup = re.sub(r"<(msub|msup|msqrt|mover)>", lambda match: match[1].upper() + " ", markup)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>|&ApplyFunction;", "", markup)).strip()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("y = a x + b", "y=ax+b"),
        ("a / b c", "FRACabc"),
        ("(a - b) / n", "FRACa−bn"),
        ("x_hat = x rstd", "MOVER x^=xrstd"),
        ("a_{t-1} <= h_t", "MSUB at−1≤MSUB ht"),
        ("sqrt(x^2 + b)", "MSQRT MSUP x2+b"),
        ("sum_i x[..., i]", "MSUB ∑iMSUB x…,i"),
        ("dy = g ∂y/∂x", "dy=gFRAC∂y∂x"),
        ("dx = g where low <= x <= high, else 0", "dx=g where low≤x≤high, else 0"),
        ("a mask, straight-through", "a mask, straight-through"),
        # Not a formula: stays as it is.
        ("z is 1; 1 / the part that is kept", "z is 1; 1 / the part that is kept"),
    ],
)
def test_a_line_is_read_by_precedence(line, shown):
    assert _text(formula(line, {"x", "y"})) == shown


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("|q| / |z|", "FRAC|q||z|"),
        ("a / sum b", "FRACa∑b"),
        ("g w dl/dz (1 - z)", "gwFRACdldz(1−z)"),
        ("f^T(x)", "MSUP fT(x)"),
        ("2^ceil(l)", "MSUP 2ceil(l)"),
        ("x .^T g", "xMSUP ·Tg"),
        ("label_smoothing t", "label_smoothingt"),
    ],
)
def test_a_quotient_or_power_takes_what_it_is_meant_to(line, shown):
    assert _text(formula(line, {"l", "z"})) == shown


def test_a_name_that_is_defined_is_no_sum():
    assert "∑" in table("    y = sum_g x")
    assert "∑" not in table("    y = sum_g x", context="    sum_g = 1")


def test_what_is_kept_is_text():
    block = "    kept  x\n          so = b / c\n    c = a / b\n"
    rows = re.findall(r"<tr>(.*?)</tr>", table(block))
    assert ["<mfrac>" in row for row in rows] == [False, False, True]


def test_what_stands_below_each_other_stays_so():
    block = (
        "    forward   y  = x        a remark\n              z  = y\n    kept      a byte of x\n"
    )
    rows = re.findall(r"<tr>(.*?)</tr>", table(block))
    assert [re.findall(r"<(th|td)", row) for row in rows] == [
        ["th", "td", "td"],
        ["td", "td"],
        ["th", "td"],
    ]
    assert _text(rows[2]) == "kepta byte of x"


def test_lines_that_go_on_have_their_equals_signs_in_a_column():
    rows = re.findall(r"<tr>(.*?)</tr>", table("    dx = a b\n       = c\n"))
    assert [len(re.findall("<td", row)) for row in rows] == [2, 2]


def _blocks():
    for path in sorted(Path(flax_customgrad.__file__).parent.rglob("*.py")):
        docstring = path.read_text().split('"""')[1]
        yield from re.findall(r"(?:^    .+\n)+", docstring, re.MULTILINE)


def test_the_formulas_of_all_files_give_elements_that_are_closed():
    for block in _blocks():
        markup = re.sub(r"colspan=(\d+)", r'colspan="\1"', table(block))
        xml.dom.minidom.parseString(markup.replace("&ApplyFunction;", "").replace("&nbsp;", " "))
