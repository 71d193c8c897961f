"""Every operation of the library that has a hand-written backward, by name.

`custom_vjp` registers what it decorates inside the package. The tests demand of the catalogue an
example for each, and take it through every transform of JAX.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

_PACKAGE = __name__.partition(".")[0]
_operations: dict[str, Any] = {}

OPERATIONS: Mapping[str, Any] = MappingProxyType(_operations)
"""From the place of each operation, such as `layers.linear.linear.linear`, to the operation."""


def register(operation: Any, fun: Callable[..., Any]) -> None:
    """Notes an operation down, where it is one of the library's own and no local one.

    Args:
        operation: what `custom_vjp` made.
        fun: the function that was decorated.
    """
    package, _, module = getattr(fun, "__module__", "").partition(".")
    if package == _PACKAGE and "<locals>" not in fun.__qualname__:
        _operations[f"{module}.{fun.__qualname__}"] = operation
