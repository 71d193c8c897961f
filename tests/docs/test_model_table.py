"""The table of whole models on the site: a row for each model of the committed measurements."""

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
