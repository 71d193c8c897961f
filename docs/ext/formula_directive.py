"""A Sphinx extension: `{formulas}`, which typesets formulas of a page as those of a docstring.

It needs no LaTeX, and the page no script from elsewhere.
"""

from typing import Any

import mathematics
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Formulas(SphinxDirective):
    """A block of formulas, in the notation that `docs/contributing.md` describes."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Typesets the block."""
        self.assert_has_content()
        return [nodes.raw("", mathematics.table("\n".join(self.content)), format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directive."""
    app.add_directive("formulas", Formulas)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
