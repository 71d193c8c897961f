"""What the functions of a custom gradient close over.

JAX differentiates such a function by its arguments alone. An array or a Module that it reaches by
its closure, and that is differentiated where the function is called, gets no gradient: JAX fails,
often long after the call, and speaks of a leaked tracer. So the closures are looked at first. One
that only settings are read from, `self.axis`, does no harm.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from flax_customgrad.contract.arguments import is_module


def check(
    name: str,
    role: str,
    function: Callable[..., Any],
    is_lost: Callable[[Any], bool],
    run: Callable[..., Any],
    arrays: Sequence[Any],
    static: Sequence[Any] = (),
) -> None:
    """Refuses a closure over what is differentiated, and a static argument that holds it.

    Args:
        name: the operation, for the message.
        role: what the function is to it, for the message.
        function: the function of the operation, its fwd or its bwd.
        is_lost: whether an array would have a gradient and cannot get it here.
        run: calls the function with arrays, to see which others it uses; it is traced, and only
            where something is lost.
        arrays: what `run` takes.
        static: the static values among the arguments.

    Raises:
        TypeError: naming what it closes over, or is given.
    """
    holds = f"of which an array is differentiated or traced where `{name}` is called"
    lost: dict[int, str] = {}
    for value in static:
        kind = type(value).__name__
        for array in filter(is_lost, _arrays(value)):
            lost[id(array)] = (
                f"`{name}` is given a {kind} {holds}. JAX takes a {kind} for a static value: make "
                "it an nnx.Module or a flax.struct.dataclass, or pass its arrays"
            )
    for variable, value in _closed_over(function, set()):
        for array in filter(is_lost, _arrays(value)):
            lost[id(array)] = (
                f"the {role} of `{name}` closes over `{variable}`, a {type(value).__name__} "
                f"{holds}. JAX differentiates an operation by its arguments alone: make "
                f"`{variable}` an argument of `{name}`"
            )
    for array in _used(run, arrays) if lost else ():
        if id(array) in lost:
            raise TypeError(lost[id(array)])


def check_residuals(name: str, static: Sequence[Any], is_lost: Callable[[Any], bool]) -> None:
    """Refuses a residual that is a static value and holds an array of the forward.

    Args:
        name: the operation, for the message.
        static: the static values among its residuals.
        is_lost: whether an array is no longer known.

    Raises:
        TypeError: a function among them closes over such an array, or an object holds one.
    """
    for value in static:
        held = [value, *(v for _, v in _closed_over(value, set()))]
        if any(is_lost(array) for v in held for array in _arrays(v)):
            kind = type(value).__name__
            raise TypeError(
                f"the residuals of `{name}` hold a {kind} that holds an array of the forward, "
                f"which is no longer known when the backward runs: to JAX a {kind} is static. Keep "
                "the array itself in the residuals; of a function, a jax.tree_util.Partial"
            )


def _closed_over(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """The names and values in a closure, and in those of the functions in it."""
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, types.MethodType):
        yield "self", function.__self__
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        return
    names = function.__code__.co_freevars
    for variable, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:
            continue  # it has no value yet
        if isinstance(value, types.FunctionType | types.MethodType):
            yield from _closed_over(value, seen)
        else:
            yield variable, value


def _arrays(value: Any) -> list[Any]:
    """The arrays of a tree, of the modules in it, which may run in circles, and of an object."""
    found = []
    for leaf in _leaves(value):
        if is_module(leaf):
            found += jax.tree.leaves(nnx.state(leaf, graph=True))
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | types.ModuleType):
            found += [leaf, *_leaves(vars(leaf))]
        else:
            found.append(leaf)
    return found


def _leaves(tree: Any) -> list[Any]:
    try:
        return jax.tree.leaves(tree, is_leaf=is_module)
    except ValueError:
        return []  # JAX does not sort the keys of every dict, and so takes no arrays out of it


def _used(run: Callable[..., Any], arrays: Sequence[Any]) -> list[Any]:
    """The arrays that come into a call from outside, or that it returns."""
    returned: list[Any] = []

    def call(*arrays: Any) -> None:
        returned.extend(jax.tree.leaves(run(*arrays)))

    try:
        program = jax.make_jaxpr(call)(*arrays)
    except Exception:
        return returned  # the call itself will say what is wrong
    return [*program.consts, *returned]
