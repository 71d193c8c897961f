"""The tables of layers beside PyTorch, of the committed measurements."""

import json
import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
MEASURED = json.loads((DOCS / "data/pytorch.json").read_text())


def _lines():
    return list(runpy.run_path(str(DOCS / "ext/pytorch_table.py"))["markdown"](MEASURED))


def test_a_row_for_each_workload():
    intro, *lines = _lines()
    assert MEASURED["machine"] in intro
    assert "torch 2" in intro
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) == len(MEASURED["rows"])
    assert {line.count("|") for line in lines if line} == {6}


def test_a_table_for_each_family():
    heads = [line for line in _lines() if line.endswith("| flax.nnx / ours |")]
    assert len(heads) == len({row["family"] for row in MEASURED["rows"]})


def test_pytorch_has_the_better_of_its_layouts():
    row = next(row for row in MEASURED["rows"] if len(row["others"]) > 1)
    shown = next(line for line in _lines() if f"`{row['layer']}`: {row['workload']} " in line)
    ratio = min(row["others"].values()) / row["milliseconds"]
    assert f"**{ratio:.2f}**" in shown
