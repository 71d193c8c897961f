"""The tables of whole models, on the site and in the README: the committed measurements."""

import json
import runpy
from pathlib import Path

import pytest

from benchmarks.zoo import TASKS

DOCS = Path(__file__).parents[2] / "docs"
TABLE = runpy.run_path(str(DOCS / "ext/model_table.py"))


def _measured(stack):
    return json.loads((DOCS / "data" / f"models_jax_{stack}.json").read_text())


@pytest.mark.parametrize("stack", ["0_10", "0_12"])
def test_a_row_for_each_model(stack):
    measured = _measured(stack)
    intro, _, head, _, *rows = TABLE["markdown"](measured)
    assert measured["machine"] in intro
    assert measured["versions"]["jax"].startswith(stack.replace("_", "."))
    assert [row.split("|")[1].strip() for row in rows] == list(TASKS)
    assert {row.count("|") for row in rows} == {head.count("|")}


def test_the_readme_shows_these_measurements():
    rows = TABLE["rows_of"](_measured("0_12"))
    readme = (DOCS.parent / "README.md").read_text()
    for model in TASKS:
        quantities = ("step", "forward", "trace", "compile")
        shown = [f"{rows[model, of]['ratio']:.2f}" for of in quantities]
        assert f"| {model} | {' | '.join(shown)} |" in readme
