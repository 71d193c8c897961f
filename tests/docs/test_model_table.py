"""The tables of whole models, on the site and in the README: the committed measurements."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.zoo import TASKS

pytest.importorskip("sphinx")
DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("stack", ["0_10", "0_12"])
def test_a_row_for_each_model(stack, monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "ext")
    import model_table

    measured = json.loads((DOCS / "data" / f"models_jax_{stack}.json").read_text())
    intro, _, head, _, *rows = model_table.markdown(measured)
    assert measured["machine"] in intro
    assert measured["versions"]["jax"].startswith(stack.replace("_", "."))
    assert [row.split("|")[1].strip() for row in rows] == list(TASKS)
    assert {row.count("|") for row in rows} == {head.count("|")}
    monkeypatch.delitem(sys.modules, "model_table")


def test_the_readme_shows_these_measurements():
    measured = json.loads((DOCS / "data" / "models_jax_0_12.json").read_text())
    readme = (DOCS.parent / "README.md").read_text()
    ratios = {
        (row["model"], row["quantity"]): f"{row['ratio']:.2f}"
        for row in measured["rows"]
        if row["form"] == "functions"
    }
    for model in TASKS:
        shown = [ratios[model, of] for of in ("step", "forward", "trace", "compile")]
        assert f"| {model} | {' | '.join(shown)} |" in readme
