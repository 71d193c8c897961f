"""A Sphinx extension: docstrings and signatures as they are written in the source.

reStructuredText reads the asterisk of a shape such as (*batch, features) as the start of emphasis,
and an absolute value |x| as a substitution. napoleon reads the text before a colon in the docstring
of a variable as its type. And `inspect` shows the default `jnp.float32` of an argument as a class
in angle brackets, and the name of a type such as ArrayLike as the ten types that it stands for.

What napoleon still reads wrongly is a warning.

A public name says that it is defined where users import it from (`registry.public`), so viewcode is
told where its source is.
"""

import ast
import functools
import inspect
import re
import sys
import textwrap
from typing import Any

from flax import nnx
from sphinx.application import Sphinx
from sphinx.util import logging

import flax_customgrad

_LOGGER = logging.getLogger(__name__)

# Asterisks to keep: in code, in emphasis that ends, and escaped ones.
_KEPT = r"`[^`]*`|\*\*(?=\w)[^*`]*\*\*(?!\w)|\*(?=\w)[^*`]*(?<=\w)\*(?!\w)|\\\*"

_PAPER = r"(?<![\w`/<])arXiv:(\d{4}\.\d{4,5})\b(?![`>])"


def escaped(line: str) -> str:
    """A line of a docstring with lone asterisks and bars escaped, and its papers linked."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    line = re.sub(rf"({_KEPT})|\*(?=\S)|\|", lambda match: match[1] or rf"\{match[0]}", line)
    return re.sub(_PAPER, r"`\g<0> <https://arxiv.org/abs/\g<1>>`__", line)


def garbled(lines: list[str], arguments: set[str]) -> list[str]:
    """What napoleon read in a docstring as something else than was meant.

    A colon in the first line of Returns ends a type for it, and in a line of Args or Raises a name:
    of "Returns: Array like x. Source: arXiv" it makes "*Array like x. Source* -- arXiv". Returns of
    this library have no types, which are in the signature.

    Args:
        lines: the docstring as napoleon left it.
        arguments: the names of the arguments.

    Returns:
        The lines that it garbled.
    """
    found = []
    for line in lines:
        field = re.match(r"\s*:(returns|rtype|raises|param|keyword|type)\b ?([^:]*):(.*)", line)
        if field is None:
            continue
        kind, name, text = field.groups()
        is_argument = name.replace("\\", "").lstrip("*") in arguments
        if (
            (kind in ("returns", "rtype") and re.match(r" \*.+?\* -- ", text))
            or (kind == "raises" and not re.fullmatch(r"[\w.~`]+", name))
            or (kind in ("param", "keyword", "type") and arguments and not is_argument)
        ):
            found.append(line.strip())
    return found


def signature(function: Any) -> tuple[str, str] | None:
    """The arguments of a function, without `self`, and what it returns; None without a source."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(node, ast.FunctionDef):
        return None
    arguments = node.args
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    types = _Types(getattr(inspect.unwrap(function), "__globals__", {}).get("__name__", ""))
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        if argument.annotation is not None:
            argument.annotation = types.visit(argument.annotation)
    returns = ast.unparse(types.visit(node.returns)) if node.returns else ""
    return f"({ast.unparse(arguments)})", returns


class _Types(ast.NodeTransformer):
    """Takes a type out of quotes, and writes out a name that the library has for a type.

    Args:
        module: the module in whose source the type stands.
    """

    def __init__(self, module: str):
        self._module = module

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        quoted = isinstance(node.value, str) and node.value.isidentifier()
        return ast.Name(node.value) if quoted else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return node if ast.unparse(node.value) == "Literal" else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in flax_customgrad.__all__:
            # A type of flax by the same name, such as Size, must not become a link to ours.
            theirs = getattr(sys.modules.get(self._module), node.id, None)
            ours = theirs is None or theirs is getattr(flax_customgrad, node.id)
            return node if ours else ast.Name(theirs.__name__)
        found = _alias(node.id, self._module)
        return node if found is None else ast.parse(found, mode="eval").body


@functools.cache
def _alias(name: str, module: str) -> str | None:
    """What a module of the library, or the one that it imports it from, calls by a name."""
    if module.partition(".")[0] != "flax_customgrad":
        return None
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=assigned)], value=value) if assigned == name:
                call = isinstance(value, ast.Call)  # a TypeVar
                return None if call else ast.unparse(_Types(module).visit(value))
            case ast.ImportFrom(module=source, names=names) if source and any(
                alias.name == name for alias in names
            ):
                return _alias(name, source)
    return None


# Stands for a colon while napoleon looks at a line.
_COLON = "\ue000"


def _hide_colon(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if what in ("data", "attribute", "property") and lines:
        lines[0] = lines[0].replace(":", _COLON)


def _finish(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    for line in garbled(lines, _arguments(obj)):
        _LOGGER.warning("the docstring of %s is read wrongly, as a field: %s", name, line)
    lines[:] = [escaped(line.replace(_COLON, ":")) for line in lines]


def _arguments(obj: Any) -> set[str]:
    """The names of the arguments of a function or a constructor; of anything else none."""
    try:
        return set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return set()


def _sign(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, shown: str | None, returns: str
) -> tuple[str, str] | None:
    if what in ("function", "method"):
        return signature(obj)
    if what != "class" or shown in (None, "()"):  # The page leaves the arguments out.
        return None
    if issubclass(obj, nnx.Module):
        found = signature(obj.__init__)
        return found and (found[0], "")
    # As Sphinx writes a Callable of any arguments.
    return shown.replace("Callable[[...], ", "Callable[..., "), returns


def _source_of(app: Sphinx, module: str, attribute: str) -> str | None:
    """The module whose source defines an attribute of a public module."""
    name = attribute.partition(".")[0]
    value = getattr(sys.modules.get(module), name, None)
    for path, candidate in list(sys.modules.items()):
        is_ours = path.partition(".")[0] == "flax_customgrad"
        if is_ours and vars(candidate).get(name) is value and name in _definitions(path):
            # A page is read again where the file changed, and not only `__init__.py`.
            app.env.note_dependency(inspect.getfile(candidate))
            return path
    return None


@functools.cache
def _definitions(module: str) -> set[str]:
    """The classes and functions that the source of a module defines."""
    body = ast.parse(inspect.getsource(sys.modules[module])).body
    return {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers what becomes of a docstring before and after napoleon, a signature and a source."""
    app.connect("autodoc-process-docstring", _hide_colon, priority=400)
    app.connect("autodoc-process-docstring", _finish, priority=600)
    app.connect("autodoc-process-signature", _sign)
    app.connect("viewcode-follow-imported", _source_of)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
