"""A Sphinx extension: `{models} FILE`, a table of what `benchmarks.models --json` has saved."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_QUANTITIES = ("step", "forward", "trace", "compile", "memory")


class Models(SphinxDirective):
    """The measurements of whole models, a row for each, in the form with `functions`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Reads the file and makes the table."""
        relative, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(relative)
        lines = list(markdown(json.loads(Path(path).read_text())))
        found = nodes.container()
        self.state.nested_parse(StringList(lines, source=path), self.content_offset, found)
        return found.children


def markdown(measured: dict[str, Any]) -> Iterator[str]:
    """The lines of the table, and before them where and when it was measured.

    Args:
        measured: what the file holds.
    """
    versions = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
    yield f"Measured on {measured['machine']}, with {versions}, {measured['date']}:"
    yield ""
    yield f"| model | {' | '.join(_QUANTITIES)} |"
    yield f"|---|{'---|' * len(_QUANTITIES)}"
    rows = {(row["model"], row["quantity"]): row for row in _of_functions(measured)}
    for model in dict.fromkeys(model for model, _ in rows):
        cells = (_cell(rows[model, quantity]) for quantity in _QUANTITIES)
        yield f"| {model} | {' | '.join(cells)} |"


def _of_functions(measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (row for row in measured["rows"] if row["form"] == "functions")


def _cell(row: dict[str, Any]) -> str:
    if row["unit"] == "MB":
        return f"{row['nnx']:.3g} → {row['ours']:.3g} MB"
    spread = f"{row['low']:.2f} to {row['high']:.2f}"
    time = f"{row['ours']:.3g} ms" if row["ours"] < 1000 else f"{row['ours'] / 1000:.2f} s"
    return f"**{row['ratio']:.2f}** ({spread}), {time}"


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("models", Models)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
