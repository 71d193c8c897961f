"""`list`: the catalogue as a table."""

import dataclasses
import re
import sys

import pytest

from flax_customgrad import catalogue
from flax_customgrad.__main__ import main


def _words(text):
    """The words of a table, whichever line they were wrapped onto."""
    return set(re.findall(r"[\w.:/#-]+", text))


@pytest.mark.smoke
def test_shows_every_entry(capsys):
    assert main(["list"]) == 0
    words = _words(capsys.readouterr().out)
    for entry in catalogue.entries():
        shown = {entry.name, entry.family, entry.gradient}
        if entry.reference:
            shown.add(entry.stands_for)
        for fact in (entry.keeps, entry.gain):
            shown |= _words(fact)
        assert shown <= words, entry.name


def test_shortens_an_address_on_github(capsys):
    main(["list"])
    out = capsys.readouterr().out
    assert "jax-ml/jax#34330" in out
    assert "https://" not in out


@pytest.mark.parametrize("columns", [80, 120])
def test_fits_its_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    main(["list"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert "\x1b" not in out


def test_family_narrows(capsys, monkeypatch):
    entries = catalogue.entries()
    other = [dataclasses.replace(e, name=f"Other{e.name}", family="b") for e in entries]
    monkeypatch.setattr(catalogue, "entries", lambda: (*entries, *other))
    assert main(["list", "--family", "b"]) == 0
    names = set(re.findall(r"^ {4}(\S+)", capsys.readouterr().out, re.MULTILINE))
    assert {e.name for e in other} <= names
    assert not {e.name for e in entries} & names


def test_without_rich_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["list"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "flax-customgrad list: rich is not installed: pip install rich\n")


def test_unknown_family(capsys):
    assert main(["list", "--family", "quantum"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "no family 'quantum'; there are " in err
    assert all(entry.family in err for entry in catalogue.entries())
