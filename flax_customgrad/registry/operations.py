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
"""Each operation by its path below the package, such as `layers.linear.linear.linear`."""


def register(operation: Any, fun: Callable[..., Any]) -> bool:
    """Registers an operation of this library; one of a user, or a local one, is left out.

    Args:
        operation: what `custom_vjp` returned.
        fun: the function that was decorated.

    Returns:
        Whether it was registered.
    """
    package, _, module = (getattr(fun, "__module__", None) or "").partition(".")
    is_own = package == _PACKAGE and "<locals>" not in fun.__qualname__
    if is_own:
        _operations[f"{module}.{fun.__qualname__}"] = operation
    return is_own
