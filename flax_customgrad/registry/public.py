"""What a public name looks like from outside: where it says it comes from, and how it prints."""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flax import nnx


def publish(namespace: Mapping[str, Any], names: Iterable[str]) -> None:
    """Makes public classes and functions say the module that users import them from.

    Which file of the package a layer is written in is nobody's business, and no part of a pickle
    or a checkpoint. A layer prints as `flax_customgrad.Linear(...)`, apart from that of nnx.

    Args:
        namespace: the globals of a public module.
        names: its public names.
    """
    for name in names:
        value = namespace.get(name)
        if inspect.isclass(value) or inspect.isfunction(value):
            value.__module__ = namespace["__name__"]
        if inspect.isclass(value) and issubclass(value, nnx.Module):
            value.__nnx_repr__ = _repr  # type: ignore[method-assign]
            value.__signature__ = _ConstructorSignature()  # type: ignore[attr-defined]


class _ConstructorSignature:
    """What `inspect.signature` finds of a Module: its constructor, which nnx's metaclass hides."""

    def __get__(self, layer: Any, cls: type) -> inspect.Signature:
        if layer is not None:
            raise AttributeError("a layer has the signature of its __call__")
        if cls.__init__ is object.__init__:
            return inspect.Signature(return_annotation=cls)
        signature = inspect.signature(cls.__init__)
        _, *parameters = signature.parameters.values()
        return signature.replace(parameters=parameters, return_annotation=cls)


def _repr(layer: nnx.Module) -> Iterator[Any]:
    """What nnx shows of a layer, with the full name of its class where that is public."""
    cls = type(layer)
    heading, *rest = nnx.Module.__nnx_repr__(layer)
    if cls.__module__.partition(".")[0] == "flax_customgrad":
        heading = dataclasses.replace(heading, type=f"{cls.__module__}.{cls.__qualname__}")
    yield heading
    yield from rest
