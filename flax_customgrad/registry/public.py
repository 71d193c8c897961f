"""Public names as users see them: their module, their printed form and their signature."""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flax import nnx


def publish(namespace: Mapping[str, Any], names: Iterable[str]) -> None:
    """Sets `__module__` of public classes and functions to the module that users import them from.

    The file that defines a layer is a detail, which no pickle or checkpoint should depend on. A
    layer prints as `flax_customgrad.Linear(...)`, to tell it from that of nnx.

    Args:
        namespace: the globals of a public module.
        names: its public names.
    """
    for name in names:
        value = namespace.get(name)
        if inspect.isclass(value) or inspect.isfunction(value):
            value.__module__ = namespace["__name__"]
        # Not `issubclass`, which asks all subclasses of an abstract class before it says no.
        if inspect.isclass(value) and nnx.Module in value.__mro__:
            value.__nnx_repr__ = _repr  # type: ignore[method-assign]
            value.__signature__ = _ConstructorSignature()  # type: ignore[attr-defined]


class _ConstructorSignature:
    """Shows `inspect.signature` the constructor of a Module, which nnx's metaclass hides."""

    def __get__(self, layer: Any, cls: type) -> inspect.Signature:
        if layer is not None:
            raise AttributeError("a layer has the signature of its __call__")
        if cls.__init__ is object.__init__:
            return inspect.Signature(return_annotation=cls)
        signature = inspect.signature(cls.__init__)
        _, *parameters = signature.parameters.values()
        return signature.replace(parameters=parameters, return_annotation=cls)


def _repr(layer: nnx.Module) -> Iterator[Any]:
    """The representation of nnx, with the full name of the class where that is public."""
    cls = type(layer)
    heading, *rest = nnx.Module.__nnx_repr__(layer)
    if cls.__module__.partition(".")[0] == "flax_customgrad":
        heading = dataclasses.replace(heading, type=f"{cls.__module__}.{cls.__qualname__}")
    yield heading
    yield from rest
