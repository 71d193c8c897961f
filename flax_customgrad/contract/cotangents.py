"""What a backward may return: the checks, and the words in which they fail.

A cotangent belongs to an argument and looks like it: an array for an array; for a Module, a State
or a dict, an `nnx.State` (or dict) with the same keys. Everything here runs while JAX traces the
backward, on shapes and dtypes, and leaves nothing behind in the compiled program but the
conversions that make a cotangent fit: one cast, and under a mesh one reduction or reshard.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract import compat
from flax_customgrad.contract.arguments import Position, by_path, is_parameters, value_of

_ByPath = dict[tuple[Any, ...], Any]


class CotangentError(ValueError):
    """A backward returned something that is not a cotangent of its argument."""


def check(
    where: str,
    names: Sequence[str],
    args: Sequence[Any],
    avals: Sequence[Any],
    cts: Any,
    *,
    casts_back: bool = False,
) -> tuple[list[Any], dict[int, str]]:
    """Checks what a backward returned and lays it out flat.

    Args:
        where: the operation, for messages.
        names: the name of each argument.
        args: the arguments, each array replaced by its `Position` in `avals`. A parameter with
            several paths stands at each; cotangents at several of its paths are added.
        avals: the type (shape, dtype, sharding) of each array among the arguments.
        cts: what the backward returned.
        casts_back: whether float64 arrays may have a float32 cotangent, as in the library's own
            operations: a layer that computes in less than float64 casts float64 arrays to its
            dtype, sums their gradient in float32, and that is cast back.

    Returns:
        A list with one cotangent per array: an array of the array's shape and dtype, or None. And
        by position what was left out, with what to say where that is differentiated.

    Raises:
        CotangentError: naming the operation, the argument, the path, what came and what to write.
    """
    per_argument = f"one cotangent per argument ({', '.join(names)})"
    if not isinstance(cts, tuple):
        raise CotangentError(
            f"the backward of {where} returned {describe(cts)}; expected a tuple with "
            f"{per_argument}"
        )
    if len(cts) != len(args):
        raise CotangentError(
            f"the backward of {where} returned a tuple of length {len(cts)}; expected length "
            f"{len(args)}, {per_argument}. Write None for an argument that has no gradient"
        )
    checker = _Checker(avals, casts_back)
    for name, arg, ct in zip(names, args, cts, strict=True):
        checker.check(f"argument `{name}` of {where}", arg, ct)
    return checker.flat, checker.left_out


class _Checker:
    """Walks through arguments and cotangents side by side and collects the cotangents."""

    def __init__(self, avals: Sequence[Any], casts_back: bool):
        self.avals = avals
        self.casts_back = casts_back
        self.flat: list[Any] = [None] * len(avals)
        self.left_out: dict[int, str] = {}

    def check(self, place: str, arg: Any, ct: Any) -> None:
        if ct is None:
            return
        if arg is None:
            raise CotangentError(
                f"the cotangent of {place} is {describe(ct)}, but the argument is None, which has "
                "no gradient: write None"
            )
        if isinstance(arg, nnx.Variable):
            arg, ct = value_of(arg), value_of(ct)
        if isinstance(arg, Position):
            self._check_array(place, arg, ct)
        elif is_parameters(arg):
            self._check_parameters(place, arg, ct)
        elif isinstance(arg, tuple | list) and type(ct) is type(arg) and len(ct) == len(arg):
            for i, (a, c) in enumerate(zip(arg, ct, strict=True)):
                self.check(f"{place}, item {i},", a, c)
        else:
            self._check_tree(place, arg, ct)

    def _check_array(self, place: str, arg: Position, ct: Any) -> None:
        if compat.is_reference(self.avals[arg]):
            raise CotangentError(
                f"the cotangent of {place} is {describe(ct)}, but the argument is a state that the "
                "backward may write: write it, state[...] = value, and return None"
            )
        ct = _fit(place, ct, self.avals[arg], self.casts_back)
        self.flat[arg] = ct if self.flat[arg] is None else self.flat[arg] + ct

    def _check_parameters(self, place: str, arg: Any, ct: Any) -> None:
        """Checks the cotangent of a Module, State or dict against its parameters, by path."""
        expected = dict(by_path(arg))
        if not isinstance(ct, nnx.State | dict):
            raise CotangentError(
                f"the cotangent of {place} is {describe(ct)}; expected an nnx.State keyed like "
                f"its parameters: write {self._pattern(expected)}"
            )
        came = dict(by_path(ct, leaves=expected))
        for path in came:
            if path not in expected:
                raise CotangentError(
                    f"the cotangent of {place} names an unknown parameter {_dotted(path)!r}"
                    f"{_similar(path, expected)}: write {self._pattern(expected)}"
                )
        mentioned = {position for path in came for position in _positions(expected[path])}
        for path, leaf in expected.items():
            if mentioned.issuperset(_positions(leaf)):
                continue
            missing = (
                f"the cotangent of {place} misses the parameter {_dotted(path)!r}, "
                f"{describe(self._type(leaf))}"
            )
            if self._is_trained(path, expected):
                raise CotangentError(
                    f"{missing}: write {self._pattern(expected)}, with None for a parameter that "
                    "has no gradient"
                )
            for position in self._floating(leaf):
                self.left_out[position] = (
                    f"{missing}, which is differentiated and on which the output depends: write "
                    f"{self._pattern(expected, path)}, with None for a parameter that has no "
                    "gradient"
                )
        for path, leaf in came.items():
            self.check(
                f"{place}, path {_dotted(path)!r},", value_of(expected[path]), value_of(leaf)
            )

    def _check_tree(self, place: str, arg: Any, ct: Any) -> None:
        """Checks the cotangent of any other tree; a static value may only have None."""
        positions, treedef = jax.tree.flatten(arg)
        try:
            leaves = treedef.flatten_up_to(ct)
        except ValueError as error:
            expected = jax.tree.map(self._type, arg)
            raise CotangentError(
                f"the cotangent of {place} is {describe(ct)}; expected the structure of the "
                f"argument, {describe(expected)}"
            ) from error
        for position, leaf in zip(positions, leaves, strict=True):
            if isinstance(position, Position):
                self.check(place, position, leaf)
            elif leaf is not None and not (isinstance(position, float) and jnp.ndim(leaf) == 0):
                raise CotangentError(
                    f"the cotangent of {place} is {describe(leaf)}, but the argument is the "
                    f"static value {position!r}, which has no gradient: write None"
                )

    def _pattern(self, expected: _ByPath, *others: tuple[Any, ...]) -> str:
        """The State that a user would write for these parameters, each at its first path."""
        paths = [path for path in expected if self._is_trained(path, expected) or path in others]
        first = {_positions(expected[path]): path for path in reversed(paths)}
        return f"nnx.State({_nested([path for path in paths if path in first.values()])})"

    def _type(self, leaf: Any) -> Any:
        return jax.tree.map(
            lambda p: self.avals[p] if isinstance(p, Position) else p, value_of(leaf)
        )

    def _is_trained(self, path: tuple[Any, ...], expected: _ByPath) -> bool:
        """Whether a backward must mention a leaf: of Variables the Params, of bare arrays all."""
        leaf = expected[path]
        if not isinstance(leaf, nnx.Param) and any(map(_is_variable, expected.values())):
            return False
        return bool(self._floating(leaf))

    def _floating(self, leaf: Any) -> list[Position]:
        """The arrays of a leaf that can have a gradient."""
        return [
            position
            for position in _positions(leaf)
            if not compat.is_reference(self.avals[position]) and _is_inexact(self.avals[position])
        ]


def _fit(place: str, ct: Any, aval: Any, casts_back: bool) -> Any:
    """Checks one cotangent against the type of its array and converts it to that type."""
    if isinstance(ct, int | float | complex):
        ct = jnp.asarray(ct, aval.dtype)
    if not (hasattr(ct, "shape") and hasattr(ct, "dtype")) or isinstance(ct, nnx.Variable):
        raise CotangentError(
            f"the cotangent of {place} is {describe(ct)}; expected {describe(aval)}, the array "
            "itself. Only a Module, a State or a dict has a State for its cotangent"
        )
    try:
        chex.assert_equal_shape([ct, aval])
    except AssertionError as error:
        raise CotangentError(
            f"the cotangent of {place} is {describe(ct)}; expected {describe(aval)}, the shape of "
            f"what it belongs to{_shape_hint(ct.shape, aval.shape)}"
        ) from error
    if not _is_inexact(aval):
        if _is_inexact(ct):
            raise CotangentError(
                f"the cotangent of {place} is {describe(ct)}, but {describe(aval)} has no "
                "gradient: write None, or leave it out of the State"
            )
        return None
    narrowest = jnp.float32 if casts_back and aval.dtype == jnp.float64 else aval.dtype
    if not _holds(ct.dtype, narrowest):
        raise CotangentError(
            f"the cotangent of {place} is {describe(ct)}; expected {describe(aval)} or a wider "
            f"dtype, which the contract casts once. {ct.dtype} cannot hold every {aval.dtype}: "
            f"compute it in {aval.dtype} (preferred_element_type=jnp.{aval.dtype} in a product, "
            f"dtype=jnp.{aval.dtype} in a sum), or cast it and accept the loss"
        )
    return _placed(ct if ct.dtype == aval.dtype else jnp.asarray(ct, aval.dtype), aval)


def _placed(ct: Any, aval: Any) -> Any:
    """Moves a cotangent to where its array lives, as autodiff does when it transposes.

    Under shard_map(check_vma=True) an array that all devices share gets a part of its gradient
    from each of them, and the gradient is their sum. With check_vma=False nothing is known to
    vary, and JAX itself takes the sum. On a mesh with Explicit axes the sharding is a part of the
    type.
    """
    came = jax.typeof(ct)
    varying, wanted = compat.varying_axes(came), compat.varying_axes(aval)
    if varying != wanted:
        if varying - wanted:
            ct = jax.lax.psum(ct, tuple(sorted(varying - wanted)))
        if wanted - varying:
            ct = jax.lax.pcast(ct, tuple(sorted(wanted - varying)), to="varying")
    mesh = aval.sharding.mesh
    if jax.sharding.AxisType.Explicit in mesh.axis_types and came.sharding != aval.sharding:
        ct = jax.reshard(ct, aval.sharding)
    return ct


def describe(value: Any) -> str:
    """An array as `float32[3,4]`; anything else by its type and what it holds."""
    if isinstance(value, nnx.Variable):
        return f"{type(value).__name__}({describe(value_of(value))})"
    if isinstance(value, nnx.State | dict):
        kind = "nnx.State" if isinstance(value, nnx.State) else "dict"
        content = (f"{_dotted(path)!r}: {describe(leaf)}" for path, leaf in by_path(value))
        return f"{kind}({{{', '.join(content)}}})"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} ({', '.join(map(describe, value))})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, nnx.Module):
        return f"a module {type(value).__name__}"
    if value is None:
        return "None"
    if dataclasses.is_dataclass(value):
        # Without the fields that flax.struct declares static.
        named = [f.name for f in dataclasses.fields(value) if f.metadata.get("pytree_node", True)]
        items = (f"{name}={describe(getattr(value, name))}" for name in named)
        return f"{type(value).__name__}({', '.join(items)})"
    return f"{value!r}, a {type(value).__name__}"


def _positions(leaf: Any) -> tuple[Position, ...]:
    return tuple(p for p in jax.tree.leaves(value_of(leaf)) if isinstance(p, Position))


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _is_inexact(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _holds(wide: Any, narrow: Any) -> bool:
    """Whether every value of the dtype `narrow` is also one of the dtype `wide`."""
    if not jnp.issubdtype(wide, jnp.inexact):
        return False
    if jnp.issubdtype(wide, jnp.complexfloating) != jnp.issubdtype(narrow, jnp.complexfloating):
        return False
    w, n = jnp.finfo(wide), jnp.finfo(narrow)
    return w.nmant >= n.nmant and w.nexp >= n.nexp


def _shape_hint(came: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """What most often leads from the one shape to the other."""
    if came == ():
        return ". A gradient of zero is None"
    extra = len(came) - len(expected)
    if extra == 0 and came == expected[::-1]:
        return ". It is transposed: swap the operands of the product"
    if extra > 0 and came[extra:] == expected:
        axes = ", ".join(map(str, range(extra)))
        return (
            ". What all examples share has the sum of their gradients: sum over the leading axes, "
            f".sum(axis=({axes},))"
        )
    return ""


def _similar(path: tuple[Any, ...], paths: Any) -> str:
    for other in paths:
        if _dotted(other) == _dotted(path):
            ours, theirs = next((a, b) for a, b in zip(path, other, strict=True) if a != b)
            kinds = " and ".join(f"{key!r}, a {type(key).__name__}" for key in (ours, theirs))
            return f": its keys and the parameter's differ in kind, {kinds}"
    close = difflib.get_close_matches(_dotted(path), map(_dotted, paths), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _nested(paths: Sequence[tuple[Any, ...]]) -> str:
    """The paths as the dict that a user would write: {'lora': {'a': ...}, 'bias': ...}."""
    children: dict[Any, list[tuple[Any, ...]]] = {}
    for key, *rest in paths:
        children.setdefault(key, []).append(tuple(rest))
    items = (f"{k!r}: {'...' if rest == [()] else _nested(rest)}" for k, rest in children.items())
    return f"{{{', '.join(items)}}}"
