"""`audit` on the command line: the table of a factory's model, and errors of one line."""

import sys

import pytest

from flax_customgrad.__main__ import main

_MODULE = """
import jax.numpy as jnp
from flax import nnx

number = 3


def small():
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.gelu)
    return model, jnp.ones((2, 4))


def alone():
    return small()[0]


def swapped():
    return small()[::-1]


def too_wide():
    return small()[0], jnp.ones((2, 5))


def broken():
    raise RuntimeError("two\\nlines")
"""


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "factories_of_test.py").write_text(_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("columns", [80, 120])
def test_prints_the_table(capsys, monkeypatch, tmp_path, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["audit", "factories_of_test:small", "--out", "kept.svg"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert "layers/1  nnx.gelu" in out
    assert out.endswith("figure: kept.svg\n")
    assert "<svg" in (tmp_path / "kept.svg").read_text()


def test_a_picture_needs_the_extra_plot_alone(capsys, monkeypatch):
    for package in ("sklearn", "optax"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main(["audit", "factories_of_test:small", "--out", "kept.svg"]) == 0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    capsys.readouterr()
    assert main(["audit", "factories_of_test:small", "--out", "kept.svg"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert 'matplotlib is not installed: pip install "flax-customgrad[plot]"' in err
    assert main(["audit", "factories_of_test:small"]) == 0


def test_prints_markdown(capsys):
    assert main(["audit", "factories_of_test:small", "--markdown"]) == 0
    assert "| layers/1 | nnx.gelu | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("factories_of_test", "expected MODULE:FACTORY"),
        ("no_such_module:small", "cannot import 'no_such_module': ModuleNotFoundError"),
        ("factories_of_test:smal", "there is no 'smal' in 'factories_of_test': did you mean small"),
        ("factories_of_test:number", "factories_of_test:number is no function, but a int"),
        ("factories_of_test:alone", "returned a Sequential; a factory returns a model and its inp"),
        ("factories_of_test:swapped", "returned no model in the first place: expected a Module"),
        ("factories_of_test:broken", "factories_of_test:broken(): RuntimeError: two lines"),
        ("factories_of_test:too_wide", "the model cannot be traced on its inputs: TypeError"),
    ],
    ids=lambda value: value.rpartition(":")[2] if value.startswith("factor") else "",
)
def test_an_error_takes_one_line(capsys, factory, reason):
    assert main(["audit", factory]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert reason in err


def test_a_picture_that_is_none(capsys):
    assert main(["audit", "factories_of_test:small", "--out", "kept.jpg"]) == 2
    assert "the figure is a .svg or .png file" in capsys.readouterr().err
