"""Arguments as JAX wants them: arrays that it traces, and a hashable rest that it carries along.

`jax.custom_vjp` takes arrays. A user hands over modules, States, dicts, None, numbers, strings and
configurations as well. `pack_tree` splits any such tree into its arrays and a `PackedTree`, which
knows how to put the arrays back; the contract does this for arguments and for residuals alike.
"""

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_customgrad.contract import compat
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

    def merge(self, state: Any) -> nnx.Module:
        """The Module, with a State in which something stands for each array."""
        return nnx.merge(self.graphdef, state)


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
        is_writable: whether it holds a Module or a Variable, into which a function can write.
    """

    treedef: Any
    leaves: tuple[Any, ...]
    size: int
    is_writable: bool

    def unpack(self, arrays: Sequence[Any]) -> Any:
        """Puts the arrays back and returns the tree."""
        return self._fill(arrays, _merge, BackwardState.bound)

    @property
    def static_leaves(self) -> list[Any]:
        """Its static values."""
        return [
            leaf
            for leaf in self.leaves
            if leaf is not _ARRAY and not isinstance(leaf, _Split | BackwardState)
        ]

    def positions(self, *, every_path: bool = False) -> Any:
        """The tree with a `Position` in place of each array and a State in place of a Module.

        Args:
            every_path: the State has a parameter that its Module holds at several paths at each of
                them; otherwise at the first alone.
        """
        return self._fill(
            map(Position, range(self.size)),
            lambda split, state, refs: _at_every_path(split, state) if every_path else state,
            lambda state, position: position,
        )

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
    is_writable = False

    def is_leaf(node: Any) -> bool:
        nonlocal is_writable
        is_writable = is_writable or is_written(node)
        return is_module(node)

    flat, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
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
    return arrays, PackedTree(treedef, tuple(leaves), len(arrays), is_writable)


def is_array(value: Any) -> bool:
    """Whether JAX traces this value: an array of JAX or NumPy, or a `jax.Ref`."""
    return isinstance(value, _ARRAYS)


def is_module(value: Any) -> bool:
    """Whether a value is split into its graph and its arrays: a Module, random streams."""
    return _holds_modules(type(value))


def is_written(value: Any) -> bool:
    """Whether what a function writes to a value is carried out of it: a Module, a Variable."""
    return _may_be_written(type(value)) and (is_module(value) or isinstance(value, nnx.Variable))


# Every node of every call is asked for these two, which took more than half of an eager call.


@functools.lru_cache(4096)
def _holds_modules(cls: type) -> bool:
    return issubclass(cls, _MODULES)


@functools.lru_cache(4096)
def _may_be_written(cls: type) -> bool:
    return issubclass(cls, (*_MODULES, nnx.Variable, *compat.POSING_AS_VARIABLES))


def is_parameters(argument: Any) -> bool:
    """Whether an argument, as `positions` shows it, has its parameters by name."""
    return isinstance(argument, Mapping)


def by_path(
    parameters: Any, leaves: Container[tuple[Any, ...]] = (), above: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (path, leaf) of a State or a nested dict; a leaf is an array or a Variable.

    Args:
        parameters: the State or dict.
        leaves: paths at which a dict is a leaf too: the value of one Variable.
        above: the path of `parameters` itself.
    """
    for key, value in parameters.items():
        path = (*above, key)
        if isinstance(value, Mapping) and path not in leaves:
            yield from by_path(value, leaves, path)
        else:
            yield path, value


def value_of(leaf: Any) -> Any:
    """What a leaf of a State holds: the value of a Variable, or the leaf itself."""
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _at_every_path(split: _Split, state: Any) -> Any:
    """A State in which a parameter that is shared stands at each of its paths, not the first."""
    if not compat.has_shared_nodes(split.graphdef):
        return state
    paths = dict(by_path(state))
    paths.update((path, leaf) for path, leaf in _variables(split.merge(state)) if path not in paths)
    return nnx.from_flat_state(list(paths.items()))


def _variables(
    node: Any, path: tuple[Any, ...] = (), above: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], nnx.Variable]]:
    """The Variables of a Module at every path that does not run in a circle."""
    for key, child in nnx.iter_children(node, graph=True):
        if isinstance(child, nnx.Variable):
            yield (*path, key), child
        elif all(child is not node for node in above):
            yield from _variables(child, (*path, key), (*above, child))


def _merge(split: _Split, state: Any, refs: list[Any]) -> Any:
    module = split.merge(state)
    for (path, held), ref in zip(split.written, refs, strict=True):
        put(module, path, held.bound(ref))
    return module


def _hashable(value: Any, what: str) -> Any:
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{what} holds a {type(value).__name__}, which is neither an array nor hashable: "
            "pass an array, a Module, an nnx.State or a dict of arrays, a flax.struct.dataclass, "
            "None, or a hashable value (a number, a string, a tuple, a frozen dataclass)"
        ) from None
    return value
