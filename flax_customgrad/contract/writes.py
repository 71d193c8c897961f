"""What a function writes into the Variables of the modules that it is handed.

Inside the rules of a custom gradient a Module is a copy: what the function or its forward writes
there (a counter, a running mean, the state of a random stream) has to be carried out and written
to the caller's Module; what a backward writes would be lost, so it is refused.
"""

from typing import Any

import jax
from flax import nnx

from flax_customgrad.contract.arguments import Static, is_module, value_of


class Snapshot:
    """The Variables of one Module at one moment."""

    def __init__(self, module: nnx.Module):
        self._module = module
        self._graphdef, self._values = _values(module)

    def updates(self, name: str) -> tuple[Static, list[Any]]:
        """What was written since, as a tree that JAX can return: the paths, and the new values.

        Args:
            name: the function, for the message.

        Raises:
            TypeError: attributes, Variables or static values of the Module changed as well.
        """
        graphdef, values = _values(self._module)
        if graphdef != self._graphdef:
            raise TypeError(
                f"`{name}` changed the structure of a {type(self._module).__name__} (an attribute "
                "was set, or a Variable added or removed). Inside a custom gradient only the value "
                "of a Variable can be written: create the Variable beforehand"
            )
        paths = tuple(path for path, value in values.items() if value is not self._values[path])
        return Static(paths), [values[path] for path in paths]

    def forbid_updates(self, name: str) -> None:
        """Refuses what a backward has written.

        Args:
            name: the function, for the message.

        Raises:
            TypeError: a Variable was written.
        """
        static, _ = self.updates(f"the backward of {name}")
        if static.value:
            paths = ", ".join(".".join(map(str, path)) for path in static.value)
            raise TypeError(
                f"the backward of `{name}` writes to {paths} of a {type(self._module).__name__}, "
                "and the write would be lost: a backward runs on a copy. Hold what a backward "
                "writes in a flax_customgrad.BackwardState, module.history = BackwardState(value)"
            )


def modules(tree: Any) -> list[nnx.Module]:
    """The modules in a tree, in order; a module within a module belongs to that one."""
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_module) if is_module(leaf)]


def apply(module: nnx.Module, updates: tuple[Static, list[Any]]) -> None:
    """Writes updates to a Module. They carry no gradient."""
    static, values = updates
    if static.value:
        flat = zip(static.value, jax.lax.stop_gradient(values), strict=True)
        nnx.update(module, nnx.from_flat_state(list(flat)))


def _values(module: nnx.Module) -> tuple[nnx.GraphDef, dict[tuple[Any, ...], Any]]:
    graphdef, state = nnx.split(module, graph=True)
    flat = nnx.to_flat_state(state)
    return graphdef, {path: value_of(leaf) for path, leaf in flat}
