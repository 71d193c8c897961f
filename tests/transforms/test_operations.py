"""Every operation of the library states the shapes of its backward."""

import ast
import importlib
import inspect
import pkgutil
import textwrap

import pytest

import flax_customgrad
from flax_customgrad.registry.operations import OPERATIONS

for info in pkgutil.walk_packages(flax_customgrad.__path__, "flax_customgrad."):
    if not info.name.endswith("__main__") and ".command" not in info.name:
        importlib.import_module(info.name)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_backward_holds_a_chex_assertion(name):
    source = textwrap.dedent(inspect.getsource(OPERATIONS[name]._bwd))
    calls = [
        node.func.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "chex"
        and node.func.attr.startswith("assert_")
    ]
    assert calls, (
        f"the backward of {name} asserts nothing: state the shapes of what it is given or returns "
        "with chex, such as chex.assert_shape(g, dims['ND'])"
    )
