"""The methods of a layer that its page documents."""

from typing import Any

_METHODS = (
    "__call__",
    "quantize",
    "observe",
    "encode",
    "codes",
    "indices_to_codes",
    "attend",
    "inverse",
    "stops_at",
    "kernel",
    "sparse_kernel",
    "initialize_carry",
    "from_layer",
    "to_layer",
)
"""Those that a user calls, in the order of a page. Others are for tools such as `pack`."""


def documented_methods(cls: Any) -> list[str]:
    """The methods of a layer that this library, and not flax, defines and documents for users."""
    found = []
    for name in _METHODS:
        owner = next((base for base in cls.__mro__ if name in vars(base)), None)
        is_ours = owner is not None and owner.__module__.partition(".")[0] == "flax_customgrad"
        if is_ours and getattr(cls, name).__doc__:
            found.append(name)
    return found
