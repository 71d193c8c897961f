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
    function: Callable[..., Any],
    is_lost: Callable[[Any], bool],
    run: Callable[..., Any],
    arrays: Sequence[Any],
) -> None:
    """Refuses a closure over what is differentiated.

    Args:
        name: the operation, for the message.
        function: its function, its fwd or its bwd.
        is_lost: whether an array would have a gradient and cannot get it here.
        run: calls the function with arrays, to see which others it uses; it is traced, and only
            where the closure holds something that is lost.
        arrays: what `run` takes.

    Raises:
        TypeError: naming what it closes over.
    """
    lost = {
        id(leaf): (variable, value)
        for variable, value in _closed_over(function, set())
        for leaf in _arrays(value)
        if is_lost(leaf)
    }
    for array in _used(run, arrays) if lost else ():
        if id(array) in lost:
            variable, value = lost[id(array)]
            raise TypeError(
                f"{getattr(function, '__name__', function)}, of the operation `{name}`, closes "
                f"over `{variable}`, a {type(value).__name__} that is differentiated or traced "
                f"where `{name}` is called. JAX differentiates an operation by its arguments "
                f"alone: make `{variable}` an argument of `{name}`"
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


def _arrays(value: Any) -> Iterator[Any]:
    """The arrays of a tree, and of the modules in it, which may run in circles."""
    for leaf in jax.tree.leaves(value, is_leaf=is_module):
        if is_module(leaf):
            yield from jax.tree.leaves(nnx.state(leaf, graph=True))
        else:
            yield leaf


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
