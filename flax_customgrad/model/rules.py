"""Rules of `convert`: which layers and functions one matches, and what becomes of a layer."""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from flax_customgrad.contract.compat import set_class
from flax_customgrad.low_bit.quant_layers.quant_layer import QuantLayer
from flax_customgrad.model.tree import Paths, is_of_user

Where = str | re.Pattern[str] | Callable[[str, nnx.Module], bool]
"""Selects layers: a regular expression for the whole path, or a predicate of path and layer."""


@dataclass(frozen=True)
class Rule:
    """How `convert` replaces the layers of one type, or one function that layers hold.

    Attributes:
        layer: the exact type of the layers; a subclass does not match, but for the drop-in of a
            layer of flax.nnx. Or a function, such as `nnx.relu`.
        to: a class with a class method `from_layer(layer)`, or a subclass of `layer` that holds
            the same state, or a function from the layer to a new one. For a function, the one that
            takes its place.
        where: selects some of these layers: a regular expression that must match the whole path,
            such as "encoder/.*", or a predicate of path and layer. A function is selected by its
            own path, `encoder/act`, and the Module that holds it.
    """

    layer: type | Callable[..., Any]
    to: Callable[..., Any]
    where: Where | None = None

    def __str__(self) -> str:
        narrowed = "" if self.where is None else f" where {format_where(self.where)}"
        return f"{qualified_name(self.layer)} -> {qualified_name(self.to)}{narrowed}"


def drop_in_rules() -> list[Rule]:
    """The rules that turn layers of flax.nnx into drop-ins."""
    from flax_customgrad import catalogue  # loads the entries of every family, so only when used

    return [Rule(layer, to) for layer, to in catalogue.drop_ins().items()]


def function_rules() -> list[Rule]:
    """The rules that turn functions of flax.nnx and jax.nn into those of this library."""
    from flax_customgrad import catalogue

    return [Rule(theirs, ours) for theirs, ours in catalogue.drop_in_functions().items()]


def rule_of_subclass(rules: Sequence[Rule], cls: type) -> Rule | None:
    """The rule that makes a drop-in of a subclass; None where methods of it would be lost."""
    drop_ins = {rule.layer: rule.to for rule in rules}
    to = next(drop_ins[base] for base in cls.__mro__ if base in drop_ins)
    return None if lost_methods(cls, to) else Rule(cls, to)  # type: ignore[arg-type]


def is_subclass(rules: Sequence[Rule], layer: nnx.Module) -> bool:
    """Whether a layer is of a user's subclass of a layer that has a drop-in."""
    return is_of_user(type(layer)) and any(
        isinstance(layer, rule.layer) for rule in rules if isinstance(rule.layer, type)
    )


def matches(where: Where | None, paths: Paths, module: Any) -> bool:
    """Whether `where` selects something, by any of the paths of what is shared.

    Args:
        where: a regular expression, a predicate, or None for everything.
        paths: the paths of a layer, or of a function that a layer holds.
        module: the layer.
    """
    if where is None:
        return True
    if isinstance(where, str | re.Pattern):
        return any(re.fullmatch(where, path) for path in paths)
    return any(where(path, module) for path in paths)


def first_matching_rule(
    rules: Sequence[Rule], paths: Paths, kind: Any, module: nnx.Module
) -> Rule | None:
    """The first rule that matches a layer, or a function that a layer holds.

    Args:
        rules: the rules.
        paths: the paths of the layer or function.
        kind: the type of the layer, or the function.
        module: the layer.
    """
    from flax_customgrad import catalogue

    replacements = {**catalogue.drop_ins(), **catalogue.drop_in_functions()}
    kinds = [kind, *(reference for reference, to in replacements.items() if to is kind)]
    matching = (
        rule
        for kind in kinds
        for rule in rules
        if rule.layer is kind and matches(rule.where, paths, module)
    )
    return next(matching, None)


def check_target(rule: Rule) -> None:
    """Checks that the target of a rule can take a layer, before any layer changes.

    Raises:
        TypeError: it needs arguments, or holds what the layer does not have, or is no target.
    """
    to, name = rule.to, getattr(rule.to, "__name__", repr(rule.to))
    if not isinstance(rule.layer, type):
        if not callable(to):
            raise TypeError(f"the rule {rule}: expected a function, got {to!r}")
        return
    if isinstance(to, type) and issubclass(to, QuantLayer) and not to.has_default_quantizers():
        raise TypeError(
            f"the rule {rule} has nothing to quantize with: write "
            f"{{{qualified_name(rule.layer)}: lambda layer: {qualified_name(to)}.from_layer("
            "layer, weight=flax_customgrad.FakeQuant(8, axis=-1))}"
        )
    if _has_own_conversion(rule):
        needed = _required_keywords(to.from_layer)  # type: ignore[union-attr]
        if needed:
            arguments = ", ".join(f"{keyword}=..." for keyword in needed)
            raise TypeError(
                f"the rule {rule}: {name}.from_layer needs {' and '.join(needed)}: write "
                f"{{{qualified_name(rule.layer)}: lambda layer: "
                f"{qualified_name(to)}.from_layer(layer, {arguments})}}"
            )
    elif not isinstance(to, type):
        if not callable(to):
            raise TypeError(f"the rule {rule}: expected a class or a function, got {to!r}")
    elif issubclass(rule.layer, to) or _is_drop_in_of_base(rule.layer, to):
        if lost := lost_methods(rule.layer, to):
            raise TypeError(
                f"the rule {rule}: {rule.layer.__name__} has {', '.join(lost)} of its own, which "
                f"{name} would not run: write a function from the layer to a new one"
            )
    elif not issubclass(to, rule.layer):
        raise TypeError(
            f"the rule {rule}: {name} has no `from_layer` and is no subclass of "
            f"{rule.layer.__name__}; give it a class method from_layer(layer), or write a "
            "function from the layer to a new one"
        )
    elif added := _arguments_of(to) - _arguments_of(rule.layer):
        raise TypeError(
            f"the rule {rule}: {name} is made with {', '.join(sorted(added))}, which a "
            f"{rule.layer.__name__} does not have; give it a class method from_layer(layer), or "
            "write a function from the layer to a new one"
        )


def _has_own_conversion(rule: Rule) -> bool:
    """Whether a rule calls `from_layer`; a drop-in whose own needs more is for other layers."""
    if not hasattr(rule.to, "from_layer"):
        return False
    needs_more = _required_keywords(rule.to.from_layer)  # type: ignore[attr-defined]
    return not (needs_more and _is_drop_in_of_base(rule.layer, rule.to))  # type: ignore[arg-type]


def _required_keywords(function: Callable[..., Any]) -> list[str]:
    """The keywords that a function cannot do without."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def _arguments_of(cls: type) -> set[str]:
    """The names of the arguments that a class is made with."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _is_drop_in_of_base(layer: type, to: type) -> bool:
    """Whether a class is the drop-in of a layer of nnx that another subclasses."""
    from flax_customgrad import catalogue

    return any(catalogue.drop_ins().get(base) is to for base in layer.__mro__)


def lost_methods(layer: type, to: type) -> list[str]:
    """The methods of a user's class that a layer would lose if it became another class."""
    from flax_customgrad import catalogue

    kept = {base for cls in (to, *catalogue.drop_ins().values()) for base in cls.__mro__}
    own = [base for base in layer.__mro__ if base not in kept]
    names = {
        name
        for base in own
        for name, value in vars(base).items()
        if name != "__init__" and (inspect.isfunction(value) or isinstance(value, property))
    }
    return sorted(name for name in names if not name.startswith("_pytree"))


def convert_layer(rule: Rule, layer: nnx.Module) -> Any:
    """Converts a layer by a rule: the same object with another class, or a new object."""
    to = rule.to
    if _has_own_conversion(rule):
        return to.from_layer(layer)  # type: ignore[union-attr]
    if isinstance(to, type):
        set_class(layer, to)
        return layer
    new = to(layer)
    if new is None:
        raise TypeError(f"the rule {rule} returned None for a layer; return the new layer")
    return new


def qualified_name(target: Any) -> str:
    """The name of a class or function after its package, which tells nnx's Linear from ours."""
    package = (getattr(target, "__module__", None) or "").partition(".")[0]
    return f"{package}.{getattr(target, '__name__', target)}"


def format_where(where: Where) -> str:
    """What selects layers, as an error shows it."""
    if isinstance(where, re.Pattern):
        return repr(where.pattern)
    return repr(where) if isinstance(where, str) else getattr(where, "__name__", repr(where))
