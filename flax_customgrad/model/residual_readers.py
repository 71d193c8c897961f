"""Which part of a model each array belongs to that its backward keeps.

The model is traced with a named scope around each of its parts, forward and backward in one jaxpr.
JAX writes the scopes of an equation beside it, also beside its transpose and beside what the
backward of a `custom_vjp` computes. So the equations of the backward tell who reads an array that
is kept. A loop is followed into its body, where the array is one slice of what it stacks.
"""

import itertools
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from flax_customgrad.contract.compat import source_line
from flax_customgrad.contract.residual_storage import inspecting_residuals
from flax_customgrad.contract.residuals import kept_arrays

_MARK = "fcg_part_"
_BACKWARD = "fcg_backward"
_REMAT = ("checkpoint", "remat", "remat2")
_LIBRARIES = ("flax", "jax", "flax_customgrad", "chex", "einops")


def scope_name(part: int) -> str:
    """The name of the scope around a part of a model.

    Args:
        part: its number.
    """
    return f"{_MARK}{part}"


@dataclass(frozen=True)
class KeptArray:
    """An array that a backward keeps beyond the arguments of the model, and who reads it.

    Attributes:
        nbytes: its bytes; of an array that a loop stacks, of all iterations.
        made_by: the part that computes it; None outside of all parts.
        read_by: the parts whose backward reads it.
        rematted: the parts that a `remat` which reads it computes again; empty where none does.
        line: the user's file and line that read it, or "".
    """

    nbytes: int
    made_by: int | None
    read_by: frozenset[int]
    rematted: frozenset[int]
    line: str


def kept_by_parts(fn: Callable[..., Any], *args: Any) -> tuple[list[KeptArray], frozenset[int]]:
    """Lists what the backward of a function keeps, as `residuals` does, with who reads it.

    Args:
        fn: a function of trees of arrays, which enters scopes called `scope_name`.
        *args: the trees, or their shapes and dtypes.

    Returns:
        The arrays, and all parts that some `remat` computes again.
    """
    kept: list[int | None] = []

    def trace(*args: Any) -> tuple[Any, Any]:
        out, pull = jax.vjp(fn, *args)
        arrays = kept_arrays(pull, args)
        kept.extend(None if residual.is_argument else residual.nbytes for _, residual in arrays)
        with jax.named_scope(_BACKWARD):
            gradient = pull(jax.tree.map(_cotangent, out))
        return [array for array, _ in arrays], gradient

    with inspecting_residuals():
        jaxpr = jax.make_jaxpr(trace)(*args).jaxpr
    is_backward = [_BACKWARD in str(eqn.source_info.name_stack) for eqn in jaxpr.eqns]
    forward = _Program(list(itertools.compress(jaxpr.eqns, map(operator.not_, is_backward))))
    backward = _Program(list(itertools.compress(jaxpr.eqns, is_backward)))
    again = frozenset(part for eqn in backward.equations for part in _parts_of_remats(eqn))
    arrays = [
        _kept_array(forward, backward, var, nbytes)
        for var, nbytes in zip(jaxpr.outvars[: len(kept)], kept, strict=True)
        if nbytes is not None
    ]
    return arrays, again


def _cotangent(out: jax.Array) -> Any:
    if jax.numpy.issubdtype(out.dtype, jax.numpy.inexact):
        return jax.numpy.ones_like(out)
    return np.zeros(out.shape, jax.dtypes.float0)


class _Program:
    """Equations, with what each variable is read and made by.

    Attributes:
        equations: the equations.
        reads: the equations that read a variable, each with its place among the operands; by key.
        makes: the equation that makes a variable, with its place among the results; by key.
    """

    def __init__(self, equations: Sequence[Any]):
        self.equations = equations
        self.reads: defaultdict[Any, list[tuple[Any, int]]] = defaultdict(list)
        self.makes: dict[Any, tuple[Any, int]] = {}
        self._inner: dict[int, list[_Body]] = {}
        for eqn in equations:
            for i, operand in enumerate(eqn.invars):
                self.reads[_key(operand)].append((eqn, i))
            for i, result in enumerate(eqn.outvars):
                self.makes[_key(result)] = (eqn, i)

    def inner(self, eqn: Any) -> "list[_Body]":
        """What an equation runs on its operands: a call, the body of a loop, or branches."""
        if id(eqn) not in self._inner:
            # The first operand of a cond tells the branch.
            skipped = int(eqn.primitive.name == "cond")
            n = len(eqn.invars) - skipped
            bodies = [body for body in _bodies(eqn) if len(body.invars) == n]
            if len(bodies) > 1 and not skipped:
                bodies = []
            self._inner[id(eqn)] = [_Body(body, _Program(body.eqns), skipped) for body in bodies]
        return self._inner[id(eqn)]


class _Body(NamedTuple):
    """A program that an equation runs, and how many of its operands are not passed on to it."""

    jaxpr: Jaxpr
    program: _Program
    skipped: int


def _key(var: Any) -> Any:
    """What tells a variable from others; a number has no identity but its value."""
    return (str(var.aval), np.asarray(var.val).tobytes()) if isinstance(var, Literal) else id(var)


def _kept_array(forward: _Program, backward: _Program, var: Any, nbytes: int) -> KeptArray:
    readers = list(_readers(backward, var, None))
    made_by, maker = (None, None) if isinstance(var, Literal) else _maker(forward, var, None)
    parts = frozenset(r.part for r in readers if r.part is not None and not r.is_remat)
    rematted = frozenset(part for r in readers for part in r.rematted)
    places = [r.equation for r in readers] + ([maker] if maker else [])
    lines = (source_line(eqn, _LIBRARIES) for eqn in places)
    return KeptArray(nbytes, made_by, parts, rematted, next(filter(None, lines), ""))


@dataclass(frozen=True)
class _Reader:
    """An equation that reads an array: its part, and what it computes again as a `remat`."""

    equation: Any
    part: int | None
    is_remat: bool = False
    rematted: frozenset[int] = frozenset()


def _readers(program: _Program, var: Any, outer: int | None) -> Iterator[_Reader]:
    """The equations that read a variable, down into calls and loops."""
    for eqn, i in program.reads[_key(var)]:
        part = _part(eqn, outer)
        if eqn.primitive.name in _REMAT:
            yield _Reader(eqn, part, True, frozenset(_parts_in(eqn.params["jaxpr"], part)))
        elif (bodies := program.inner(eqn)) and not isinstance(var, Literal):
            for body in bodies:
                if i >= body.skipped:
                    yield from _readers(body.program, body.jaxpr.invars[i - body.skipped], part)
        else:
            yield _Reader(eqn, part)


def _maker(program: _Program, var: Any, outer: int | None) -> tuple[int | None, Any]:
    """The part that computes a variable, and the equation; down into calls and loops."""
    if _key(var) not in program.makes:
        return outer, None
    eqn, i = program.makes[_key(var)]
    part, bodies = _part(eqn, outer), program.inner(eqn)
    if len(bodies) != 1 or len(bodies[0].jaxpr.outvars) != len(eqn.outvars):
        return part, eqn
    (body,) = bodies
    result = body.jaxpr.outvars[i]
    if isinstance(result, Literal):
        return part, eqn
    if result in body.jaxpr.invars:
        # It is what was passed in.
        passed = eqn.invars[body.skipped + body.jaxpr.invars.index(result)]
        return _maker(program, passed, outer)
    return _maker(body.program, result, part)


def _part(eqn: Any, outer: int | None) -> int | None:
    """The innermost part that an equation stands in."""
    found = re.findall(rf"{_MARK}(\d+)", str(eqn.source_info.name_stack))
    return int(found[-1]) if found else outer


def _bodies(eqn: Any) -> Iterator[Jaxpr]:
    """The programs among the parameters of an equation."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _parts_in(jaxpr: Jaxpr, outer: int | None) -> Iterator[int]:
    """The parts that the equations of a program stand in."""
    for eqn in jaxpr.eqns:
        part = _part(eqn, outer)
        if part is not None:
            yield part
        for body in _bodies(eqn):
            yield from _parts_in(body, part)


def _parts_of_remats(eqn: Any) -> Iterator[int]:
    for body in _bodies(eqn):
        if eqn.primitive.name in _REMAT:
            yield from _parts_in(body, None)
        else:
            for inner in body.eqns:
                yield from _parts_of_remats(inner)
