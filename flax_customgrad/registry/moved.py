"""Import paths that earlier documentation showed: they still work, and warn with the new one."""

import sys
import types
import warnings
from typing import Any

_MOVED = {
    "codebook": {},
    "codebook.nearest": {"nearest": "nearest_code"},
    "codebook.usage": {"Quantized": "Quantized", "perplexity": "codebook_perplexity"},
    "codebook.vector_quantizer": {"Codebook": "Codebook", "VectorQuantizer": "VectorQuantizer"},
    "linear": {},
    "linear.linear": {"Linear": "Linear"},
}
"""For each old module below the package: its names, and their public names now."""


class _MovedModule(types.ModuleType):
    """An old module that no longer exists; its names are looked up in the package."""

    def __init__(self, package: types.ModuleType, name: str, names: dict[str, str]):
        super().__init__(f"{package.__name__}.{name}", "Moved: see the warning.")
        self.__path__ = []
        self._package = package
        self._names = names

    def __getattr__(self, name: str) -> Any:
        new = self._names.get(name)
        if new is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        package = self._package
        warnings.warn(
            f"{self.__name__}.{name} is {package.__name__}.{new} now",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(package, new)


def install(package: types.ModuleType) -> None:
    """Makes the old paths importable.

    Args:
        package: `flax_customgrad`, which has the names.
    """
    for name, names in _MOVED.items():
        module = _MovedModule(package, name, names)
        sys.modules[module.__name__] = module
        parent, _, short = module.__name__.rpartition(".")
        setattr(sys.modules[parent], short, module)
