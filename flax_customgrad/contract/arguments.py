"""Arguments as JAX wants them: arrays that it traces, and a hashable rest that it carries along.

`jax.custom_vjp` takes arrays. A user hands over modules, States, dicts, None, numbers, strings and
configurations as well. `pack_tree` splits any such tree into its arrays and a `PackedTree`, which
knows how to put the arrays back; the contract does this for arguments and for residuals alike.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_customgrad.contract.backward_state import BackwardState, put, states_of


@jax.tree_util.register_static
@dataclass(frozen=True)
class Static:
    """A hashable value that travels through JAX as structure, not as data."""

    value: Any


@dataclass(frozen=True)
class _Split:
    """A Module taken apart: its `size` arrays are traced, its graph and tree definitions stay.

    Behind its arrays come the Refs of its each `BackwardState`, which are found at `written`.
    """

    graphdef: nnx.GraphDef
    state: Any
    size: int
    written: tuple[tuple[tuple[Any, ...], BackwardState], ...]


class Position(int):
    """The place of an array among the arrays of a call; told apart from any static number."""


# Stands for an array where a static leaf would hold its value.
_ARRAY = object()

# Tuples, since these are asked of every leaf of every call and a union is built anew each time.
_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.Ref)
_MODULES = (nnx.Module, nnx.Rngs, nnx.RngStream)


@dataclass(frozen=True)
class PackedTree:
    """A tree without its arrays.

    Attributes:
        treedef: structure of the tree, in which a Module counts as one leaf.
        leaves: per leaf the static value, a split Module, a `BackwardState`, or a mark where an
            array goes.
        size: number of arrays that `unpack` takes.
    """

    treedef: Any
    leaves: tuple[Any, ...]
    size: int

    def unpack(self, arrays: Sequence[Any]) -> Any:
        """Puts the arrays back and returns the tree."""
        return self._fill(arrays, _merge, BackwardState.bound)

    def positions(self) -> Any:
        """The tree with a `Position` in place of each array and a State in place of a Module."""
        return self._fill(
            map(Position, range(self.size)),
            lambda split, state, refs: state,
            lambda state, position: position,
        )

    @property
    def has_modules(self) -> bool:
        """Whether the tree holds a Module."""
        return any(isinstance(leaf, _Split) for leaf in self.leaves)

    def _fill(
        self,
        arrays: Iterable[Any],
        restore: Callable[[_Split, Any, list[Any]], Any],
        bind: Callable[[BackwardState, Any], Any],
    ) -> Any:
        rest = iter(arrays)
        leaves = []
        for leaf in self.leaves:
            if leaf is _ARRAY:
                leaf = next(rest)
            elif isinstance(leaf, _Split):
                state = leaf.state.unflatten([next(rest) for _ in range(leaf.size)])
                leaf = restore(leaf, state, [next(rest) for _ in leaf.written])
            elif isinstance(leaf, BackwardState):
                leaf = bind(leaf, next(rest))
            leaves.append(leaf)
        return self.treedef.unflatten(leaves)


def pack_tree(tree: Any, what: str) -> tuple[list[Any], PackedTree]:
    """Splits a tree into its arrays and everything else.

    Args:
        tree: modules, States, dicts, tuples, arrays, `jax.Ref`s, each `BackwardState`, None and
            hashable values.
        what: the name of the tree in an error message.

    Returns:
        The arrays, in order, and what is left.

    Raises:
        TypeError: a leaf is neither an array nor hashable.
    """
    flat, treedef = jax.tree.flatten(tree, is_leaf=is_module)
    arrays: list[Any] = []
    leaves = []
    for leaf in flat:
        if is_array(leaf):
            arrays.append(leaf)
            leaves.append(_ARRAY)
        elif is_module(leaf):
            graphdef, state = nnx.split(leaf, graph=True)
            values, structure = jax.tree.flatten(state)
            written = tuple(states_of(leaf))
            arrays.extend(values)
            arrays.extend(state.ref for _, state in written)
            leaves.append(_Split(graphdef, structure, len(values), written))
        elif isinstance(leaf, BackwardState):
            arrays.append(leaf.ref)
            leaves.append(leaf)
        else:
            leaves.append(_hashable(leaf, what))
    return arrays, PackedTree(treedef, tuple(leaves), len(arrays))


def is_array(value: Any) -> bool:
    """Whether JAX traces this value: an array of JAX or NumPy, or a `jax.Ref`."""
    return isinstance(value, _ARRAYS)


def is_module(value: Any) -> bool:
    """Whether a value is split, and what is written to it carried out: a Module, random streams."""
    return isinstance(value, _MODULES)


def is_parameters(argument: Any) -> bool:
    """Whether an argument, as `positions` shows it, has its parameters by name."""
    return isinstance(argument, Mapping)


def by_path(parameters: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (path, leaf) of a State or a nested dict; a leaf is an array or a Variable."""
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            yield from (((key, *path), leaf) for path, leaf in by_path(value))
        else:
            yield (key,), value


def value_of(leaf: Any) -> Any:
    """What a leaf of a State holds: the value of a Variable, or the leaf itself."""
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _merge(split: _Split, state: Any, refs: list[Any]) -> Any:
    module = nnx.merge(split.graphdef, state)
    for (path, held), ref in zip(split.written, refs, strict=True):
        put(module, path, held.bound(ref))
    return module


def _hashable(value: Any, what: str) -> Any:
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{what} holds a {type(value).__name__}, which is neither an array nor hashable: "
            "pass an array, a Module, an nnx.State or a dict of arrays, None, or a hashable value "
            "(a number, a string, a tuple, a frozen dataclass)"
        ) from None
    return value
