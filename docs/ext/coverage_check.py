"""A Sphinx extension: the build fails when a public name is not documented.

Public is what a module defines without a leading underscore, what it lists in `__all__`, and what
it re-exports with `import name as name`. A name counts as documented where any page documents the
same object, under whatever path.

Configuration:
    coverage_modules: the modules whose public names must be documented.
"""

import ast
import importlib
import inspect
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, TypeVar

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError


def public_names(module: ModuleType) -> list[str]:
    """The public names of a module, sorted."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    names: set[str] = set()
    for node in ast.parse(inspect.getsource(module)).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names.update(target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Import(names=imported) | ast.ImportFrom(names=imported):
                names.update(alias.name for alias in imported if alias.asname == alias.name)
    return sorted(
        name
        for name in names
        if not name.startswith("_") and not isinstance(getattr(module, name), TypeVar)
    )


def missing(modules: Sequence[str], documented: Iterable[str]) -> list[str]:
    """The public names of some modules that no documented object stands for.

    Args:
        modules: full names of the modules.
        documented: full names of the objects that the pages document.

    Returns:
        Full names, in the order of the modules.
    """
    found = {id(value) for value in map(_resolve, documented) if value is not None}
    return [
        f"{module}.{name}"
        for module in modules
        for name in public_names(importlib.import_module(module))
        if id(_resolve(f"{module}.{name}")) not in found
    ]


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the check, which runs once all pages are read."""
    app.add_config_value("coverage_modules", [], "env", [list])
    app.connect("env-check-consistency", _check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    documented = (name for name, *_ in env.get_domain("py").get_objects())
    undocumented = missing(app.config.coverage_modules, documented)
    if undocumented:
        raise ExtensionError(
            f"no page documents these public names: {', '.join(undocumented)}. Add them to "
            "a page below docs/families or docs/api, or give them a leading underscore"
        )


def _resolve(name: str) -> Any:
    """The object with a full name, or None where there is none."""
    head, _, tail = name.rpartition(".")
    if not head:
        return importlib.import_module(name)
    owner = _resolve(head)
    try:
        return getattr(owner, tail) if hasattr(owner, tail) else importlib.import_module(name)
    except ImportError:
        return None
