"""A Sphinx extension: the tables of files of measurements.

`{models} FILE` is that of whole models, `{scanned} FILE` that of layers in a scan, and
`{pytorch} FILE` those of layers beside PyTorch.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import model_table
import pytorch_table
import scanned_table
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class MeasuredTable(SphinxDirective):
    """The table of a file, which is its argument."""

    required_arguments = 1
    markdown: ClassVar[Callable[[dict[str, Any]], Iterator[str]]]

    def run(self) -> list[nodes.Node]:
        """Reads the file and makes the table."""
        relative, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(relative)
        lines = list(type(self).markdown(json.loads(Path(path).read_text())))
        found = nodes.container()
        self.state.nested_parse(StringList(lines, source=path), self.content_offset, found)
        return found.children


class Models(MeasuredTable):
    """A row for each model."""

    markdown = model_table.markdown


class Scanned(MeasuredTable):
    """A row for each form of layers in a scan."""

    markdown = scanned_table.markdown


class PyTorch(MeasuredTable):
    """A row for each layer that PyTorch has too."""

    markdown = pytorch_table.markdown


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directives."""
    app.add_directive("models", Models)
    app.add_directive("scanned", Scanned)
    app.add_directive("pytorch", PyTorch)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
