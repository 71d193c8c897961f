"""What a function writes into the Variables, and the Variables of Modules, that it is handed.

Inside the rules of a custom gradient they are copies: what the function or its forward writes
there (a counter, a running mean, the state of a random stream) has to be carried out and written
to the caller's; what a backward writes would be lost, so it is refused.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from flax import nnx

from flax_customgrad.contract.arguments import Static, is_written, value_of
from flax_customgrad.contract.backward_state import at


class Snapshot:
    """The values of one Module, or of one Variable, at one moment."""

    def __init__(self, node: Any):
        self._node = node
        self._graphdef, self._values = _values(node)

    def updates(self, name: str) -> tuple[Static, list[Any]]:
        """What was written since, as a tree that JAX can return: the paths, and the new values.

        Args:
            name: the function, for the message.

        Raises:
            TypeError: attributes, Variables or static values of the Module changed as well.
        """
        graphdef, values = _values(self._node)
        if graphdef != self._graphdef:
            raise TypeError(
                f"`{name}` changed the structure of a {type(self._node).__name__} (an attribute "
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
            TypeError: a Variable was written, or a random stream drawn from.
        """
        paths = self.updates(f"the backward of {name}")[0].value
        if not paths:
            return
        where = f"a {type(self._node).__name__}"
        if not isinstance(self._node, nnx.Variable):
            where = f"{dotted(paths)} of {where}"
        if any(isinstance(at(self._node, path), nnx.RngState) for path in paths):
            raise TypeError(
                f"the backward of `{name}` draws from the random stream of {where} again, and gets "
                "other numbers than the forward: let fwd keep what it drew, the mask or the key, "
                "in the residuals"
            )
        raise TypeError(
            f"the backward of `{name}` writes to {where}, and the write would be lost: a backward "
            "runs on a copy. Hold what a backward writes in a flax_customgrad.BackwardState, "
            "module.history = BackwardState(value)"
        )


def snapshots(tree: Any) -> list[Snapshot]:
    """Remembers the values of all that is written in a tree, in order."""
    return [Snapshot(node) for node in _written(tree)]


def apply(name: str, tree: Any, updates: Sequence[tuple[Static, list[Any]]]) -> None:
    """Writes what a function has written to the copies to the Modules and Variables themselves.

    What is written carries no gradient.

    Args:
        name: the function, for the message.
        tree: what the function was given.
        updates: of each of its snapshots.

    Raises:
        TypeError: one Variable was written through two arguments.
    """
    nodes = _written(tree)
    written = [
        id(at(node, path))
        for node, (static, _) in zip(nodes, updates, strict=True)
        for path in static.value
    ]
    if len(set(written)) < len(written):
        raise TypeError(
            f"`{name}` is given one Variable in two of its arguments, which are two copies inside, "
            "and writes to both, so that one write would be lost: pass it once"
        )
    for node, (static, values) in zip(nodes, updates, strict=True):
        new = jax.lax.stop_gradient(values)
        if isinstance(node, nnx.Variable):
            for value in new:
                nnx.update(node, value)
        elif new:
            nnx.update(node, nnx.from_flat_state(list(zip(static.value, new, strict=True))))


def dotted(paths: Iterable[tuple[Any, ...]]) -> str:
    """Paths as a user writes them: `encoder.calls, mean`."""
    return ", ".join(".".join(map(str, path)) for path in paths)


def _written(tree: Any) -> list[Any]:
    """What is written in a tree, in order; what is within a Module belongs to that one."""
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_written) if is_written(leaf)]


def _values(node: Any) -> tuple[nnx.GraphDef, dict[tuple[Any, ...], Any]]:
    graphdef, state = nnx.split(node, graph=True)
    flat = [((), state)] if isinstance(state, nnx.Variable) else nnx.to_flat_state(state)
    return graphdef, {path: value_of(leaf) for path, leaf in flat}
