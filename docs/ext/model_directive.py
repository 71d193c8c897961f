"""A Sphinx extension: `{models} FILE`, the table of whole models of a file of measurements."""

import json
from pathlib import Path
from typing import Any

import model_table
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Models(SphinxDirective):
    """The measurements of whole models, a row for each."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Reads the file and makes the table."""
        relative, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(relative)
        lines = list(model_table.markdown(json.loads(Path(path).read_text())))
        found = nodes.container()
        self.state.nested_parse(StringList(lines, source=path), self.content_offset, found)
        return found.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("models", Models)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
