"""Every public name is documented, and every example in a docstring runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import flax_customgrad

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(flax_customgrad.__path__, "flax_customgrad.")
    if not info.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for member_name, member in vars(module).items():
        if member_name.startswith("_") or getattr(member, "__module__", None) != name:
            continue
        if not (inspect.isclass(member) or inspect.isfunction(member)):
            continue
        assert member.__doc__, f"{name}.{member_name}"
        for method_name, method in vars(member).items() if inspect.isclass(member) else ():
            if not method_name.startswith("_") and inspect.isfunction(method):
                assert method.__doc__, f"{name}.{member_name}.{method_name}"
