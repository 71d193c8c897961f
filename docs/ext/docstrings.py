"""A Sphinx extension: escapes what reStructuredText and napoleon would misread in a docstring.

reStructuredText reads the asterisk of a shape such as (*batch, features) as the start of emphasis,
and an absolute value |x| as a substitution. napoleon reads the text before a colon in the docstring
of a variable as its type.
"""

import re
from typing import Any

from sphinx.application import Sphinx

# Asterisks to keep: in code, in emphasis that ends, and escaped ones.
_KEPT = r"`[^`]*`|\*\*(?=\w)[^*`]*\*\*(?!\w)|\*(?=\w)[^*`]*(?<=\w)\*(?!\w)|\\\*"


def escaped(line: str) -> str:
    """A line of a docstring with its lone asterisks and its vertical bars escaped."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    return re.sub(rf"({_KEPT})|\*(?=\S)|\|", lambda match: match[1] or rf"\{match[0]}", line)


# Stands for a colon while napoleon looks at a line.
_COLON = "\ue000"


def _hide_colon(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if what in ("data", "attribute", "property") and lines:
        lines[0] = lines[0].replace(":", _COLON)


def _finish(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [escaped(line.replace(_COLON, ":")) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the changes to a docstring before and after napoleon."""
    app.connect("autodoc-process-docstring", _hide_colon, priority=400)
    app.connect("autodoc-process-docstring", _finish, priority=600)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
