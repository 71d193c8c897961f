"""Every public name has a docstring, and every example in a docstring runs."""

import ast
import doctest
import re
from pathlib import Path

import pytest

import flax_customgrad

PACKAGE = Path(flax_customgrad.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(tree, prefix=""):
    """The definitions of a module and of its classes, with their dotted names."""
    for node in tree.body:
        if isinstance(node, Definition):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{prefix}{node.name}.")


def _examples():
    for path, tree in TREES.items():
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for name, node in (("", tree), *_definitions(tree)):
            docstring = ast.get_docstring(node) or ""
            if ">>> " in docstring:
                yield pytest.param(docstring, path, id=f"{module}:{name}")


@pytest.mark.parametrize(("docstring", "path"), list(_examples()))
def test_examples_run(docstring, path, request):
    # As a reader copies it: an example imports what it uses.
    names = {"__name__": "__main__"}
    example = doctest.DocTestParser().get_doctest(docstring, names, request.node.name, str(path), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example).failed == 0


@pytest.mark.smoke
def test_public_names_have_docstrings():
    missing = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path, tree in TREES.items()
        for name, node in (("", tree), *_definitions(tree))
        if not re.search(r"\b_", name) and not ast.get_docstring(node) and not _is_overload(node)
    ]
    assert not missing


def _is_overload(node):
    return any(
        ast.unparse(decorator) == "overload" for decorator in getattr(node, "decorator_list", ())
    )
