"""`list`: the catalogue as lines, a family, or one layer in full."""

import re
import sys

import pytest

from flax_customgrad import catalogue
from flax_customgrad.__main__ import main


def _printed(capsys, *arguments):
    assert main(["list", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.smoke
def test_shows_every_entry_in_a_line(capsys):
    lines = _printed(capsys).splitlines()
    for entry in catalogue.entries():
        (line,) = (line for line in lines if line.startswith(f"  {entry.name} "))
        shown = line.split()
        assert entry.gradient in shown
        assert entry.gain.split()[0] in shown
    assert {entry.family for entry in catalogue.entries()} <= set(lines)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("arguments", [(), ("linear",), ("Linear",)])
def test_fits_its_terminal(capsys, monkeypatch, columns, arguments):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = _printed(capsys, *arguments)
    assert max(map(len, out.splitlines())) <= columns
    assert "\x1b" not in out


def test_a_family_alone_with_what_it_keeps(capsys):
    out = _printed(capsys, "linear")
    assert " ".join(catalogue.find("Embed").keeps.split()) in " ".join(out.split())
    names = set(re.findall(r"^  (\S+)", out, re.MULTILINE))
    assert names == {e.name for e in catalogue.entries() if e.family == "linear"}


@pytest.mark.parametrize("name", ["Linear", "LINEAR", "layernorm", "batchnorm"])
def test_a_layer_in_full_in_any_case(capsys, name):
    entry = catalogue.find(name)
    assert entry.name.lower() == name.lower()
    out = " ".join(_printed(capsys, name).split())
    for fact in (entry.name, entry.stands_for, entry.keeps, entry.gain, "param_dtype"):
        assert " ".join(fact.split()) in out


def test_shortens_an_address_on_github(capsys):
    out = _printed(capsys, "Linear")
    assert "jax-ml/jax#34330" in out
    assert "https://" not in out


def test_without_rich_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["list"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "flax-customgrad list: rich is not installed: pip install rich\n")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Linaer", "no layer 'Linaer': did you mean Linear"),
        ("GEGLU", "no layer 'GEGLU': did you mean geglu or GeGLU?"),
        ("quantum", "no layer 'quantum'"),
    ],
)
def test_a_name_that_is_none(capsys, name, hint):
    assert main(["list", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert hint in err
    assert all(entry.family in err for entry in catalogue.entries())
