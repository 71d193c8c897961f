"""The files of a layer: the one that defines it, and those with the operations that it uses."""

import ast
import functools
import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

from flax_customgrad import catalogue
from flax_customgrad.registry.operations import OPERATIONS

_PACKAGE = "flax_customgrad"


def mathematics_of(entry: catalogue.Entry) -> list[ModuleType]:
    """The file of a layer, and those of its family's folder with the operations that it names.

    Where a file does not say what its backward is, all operations that it uses are meant.
    """
    own = module_of(entry)
    with_operations = {f"{_PACKAGE}.{name.rpartition('.')[0]}" for name in OPERATIONS}
    found, seen = [own], [own.__name__]
    for name in seen:
        for imported in _imports(name):
            if imported in seen or not imported.startswith(own.__name__.rpartition(".")[0] + "."):
                continue
            seen.append(imported)
            if imported not in with_operations:
                continue
            module = importlib.import_module(imported)
            mentions = "\n".join(filter(None, (m.__doc__ for m in found)))
            is_named = f"`{imported.rpartition('.')[2]}`" in mentions
            if is_named or "backward" not in (own.__doc__ or ""):
                found.append(module)
    return found


@functools.cache
def _imports(module: str) -> list[str]:
    """The modules of the library that a module imports, or imports from."""
    found = []
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_PACKAGE):
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in found if name in sys.modules]


def module_of(entry: catalogue.Entry) -> ModuleType:
    """The module whose source defines a layer."""
    return _definitions()[entry.module]


@functools.cache
def _definitions() -> dict[Any, ModuleType]:
    """The module that defines each class and function of the library."""
    found = {}
    for path, module in list(sys.modules.items()):
        if path.startswith(f"{_PACKAGE}.") and getattr(module, "__file__", None):
            for node in ast.parse(inspect.getsource(module)).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    found[getattr(module, node.name)] = module
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    value = getattr(module, node.targets[0].id)
                    if callable(value):
                        found.setdefault(value, module)
    return found
