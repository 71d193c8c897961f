"""A Sphinx extension: docstrings are read as they were meant.

A shape such as (*batch, features) is no emphasis: reStructuredText reads a lone asterisk as the
start of one and warns that it does not end. An absolute value |x| is no substitution. A sentence
with a colon about a piece of data is no type with a description: napoleon takes what stands before
the colon away. And the constructor of a Module is its `__init__`: the metaclass of NNX hides it
from `inspect`.
"""

import ast
import inspect
import re
import textwrap
from typing import Any

from flax import nnx
from sphinx.application import Sphinx

# What keeps its asterisks: code, emphasis that ends, an asterisk that is escaped already.
_KEPT = r"`[^`]*`|\*\*(?=\w)[^*`]*\*\*(?!\w)|\*(?=\w)[^*`]*(?<=\w)\*(?!\w)|\\\*"


def escaped(line: str) -> str:
    """A line of a docstring with its lone asterisks and its vertical bars escaped."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    return re.sub(rf"({_KEPT})|\*(?=\S)|\|", lambda match: match[1] or rf"\{match[0]}", line)


def constructor(cls: type[nnx.Module]) -> str:
    """The arguments that a Module is made with, as they stand in its source, without types."""
    for base in cls.__mro__:
        if not inspect.isfunction(vars(base).get("__init__")):
            continue
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(base.__init__))).body
        arguments = function.args
        if arguments.vararg is not None and arguments.kwarg is not None:
            continue  # it hands everything on to the next class
        arguments.args = arguments.args[1:]
        for argument in (*arguments.args, *arguments.kwonlyargs):
            argument.annotation = None
        return f"({ast.unparse(arguments)})"
    return "()"


# Stands for a colon while napoleon looks at a line.
_COLON = "\ue000"


def _hide_colon(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if what in ("data", "attribute", "property") and lines:
        lines[0] = lines[0].replace(":", _COLON)


def _finish(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [escaped(line.replace(_COLON, ":")) for line in lines]


def _sign(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    if what == "class" and issubclass(obj, nnx.Module):
        return constructor(obj), returns
    return None


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers what happens to a docstring before and behind napoleon, and to a signature."""
    app.connect("autodoc-process-docstring", _hide_colon, priority=400)
    app.connect("autodoc-process-docstring", _finish, priority=600)
    app.connect("autodoc-process-signature", _sign)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
