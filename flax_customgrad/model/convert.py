"""`convert` and `revert`: from the layers of flax.nnx to those of this library, and back.

A drop-in subclasses the layer that it replaces and adds no state, so a layer is converted by
changing its class. The object stays the same, so shared layers stay shared, and the parameters, the
state of an optimizer and checkpoints are untouched. (One drop-in has a conversion of its own:
`WeightNorm` turns the bare arrays that flax 0.12.8 holds as scales into Params.) A user's rule may
build a new layer instead; then every reference to the old layer is replaced.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from flax import nnx

from flax_customgrad.contract.compat import set_class
from flax_customgrad.low_bit.frozen.frozen_linear import FrozenLinear
from flax_customgrad.low_bit.quant_layers.quant_layer import QuantLayer

M = TypeVar("M")

Where = str | re.Pattern[str] | Callable[[str, nnx.Module], bool]
"""Selects layers: a regular expression for the whole path, or a predicate of path and layer."""


@dataclass(frozen=True)
class Rule:
    """How `convert` replaces the layers of one type.

    Attributes:
        layer: the exact type of the layers; a subclass does not match, but for the drop-in of a
            layer of flax.nnx.
        to: a class with a class method `from_layer(layer)`, or a subclass of `layer` that holds
            the same state, or a function from the layer to a new one.
        where: selects some of these layers: a regular expression that must match the whole path,
            such as "encoder/.*", or a predicate of path and layer.
    """

    layer: type
    to: Callable[..., Any]
    where: Where | None = None

    def __str__(self) -> str:
        narrowed = "" if self.where is None else f" where {_format_where(self.where)}"
        return f"{_qualified_name(self.layer)} -> {_qualified_name(self.to)}{narrowed}"


def convert(
    model: M,
    *,
    where: Where | None = None,
    rules: Mapping[type, Callable[..., Any]] | Sequence[Rule] | None = None,
    subclasses: bool = False,
) -> M:
    """Gives the layers of a model the hand-written backwards of this library.

    Without rules, every layer whose exact type is one of flax.nnx that has a drop-in becomes that
    drop-in, in place. Layers of other types stay as they are, among them subclasses and layers that
    are converted already. An optimizer goes on; if a rule changes the parameters, as a learned
    scale does, make the optimizer afterwards, or make it anew. Call it outside of `nnx.jit`, which
    hands out no layer of another class; a model that is made and converted inside is fine.

    Args:
        model: a Module, or a tree of Modules. It is changed in place.
        where: selects some of the layers: a regular expression that must match the whole path of a
            layer, such as "encoder/.*", or a predicate of path and layer. A path is made of
            attribute names and indices, `blocks/0/up`; that of the model itself is empty.
        rules: the replacements, instead of the drop-ins: a mapping from type to class or function,
            or a sequence of `Rule`. The first rule that matches a layer applies. A rule for a layer
            of flax.nnx is one for its drop-in too.
        subclasses: whether subclasses of the layers of flax.nnx become drop-ins as well. They lose
            their type. One with methods beside its constructor stays, which a warning says.

    Returns:
        The model; a new object only if a rule replaces the model itself.

    Raises:
        ValueError: a rule, or `where`, matches no layer; the error names it.
        TypeError: the model holds no Module, or the target of a rule cannot replace a layer.

    Warns:
        UserWarning: nothing was converted, for the layers are subclasses of those of flax.nnx.

    Example:
        >>> import flax_customgrad as fcg
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
        >>> type(fcg.convert(model).layers[0])
        <class 'flax_customgrad.Linear'>
    """
    if rules is None:
        rules = _drop_in_rules()
        kept = [(paths, layer) for paths, layer in layers(model) if _is_subclass(rules, layer)]
        if subclasses:
            taken = {type(layer) for _, layer in kept}
            rules += [rule for cls in taken if (rule := _rule_of_subclass(rules, cls))]
        known = {kind for rule in rules for kind in (rule.layer, rule.to)}
        left = [(paths, layer) for paths, layer in kept if type(layer) not in known]
        if left and (subclasses or not any(type(layer) in known for _, layer in layers(model))):
            warnings.warn(_about_subclasses(left, subclasses), stacklevel=2)
        return _apply_rules(model, rules, where, must_match=False)
    if isinstance(rules, Mapping):
        rules = [Rule(layer, to) for layer, to in rules.items()]
    return _apply_rules(model, rules, where, must_match=True)


def revert(model: M, *, where: Where | None = None) -> M:
    """Turns the drop-ins of a model back into the layers of flax.nnx, in place.

    Args:
        model: a Module, or a tree of Modules. It is changed in place.
        where: selects some of the layers, as in `convert`.

    Returns:
        The model.

    Raises:
        ValueError: `where` matches no layer.
        TypeError: the model holds no Module.

    Warns:
        UserWarning: layers of this library stay, which compute something else than those of nnx.
    """
    stay = [
        (paths, layer)
        for paths, layer in layers(model)
        if _matches(where, paths, layer) and _computes_something_else(layer)
    ]
    if stay:
        warnings.warn(
            f"revert: these layers compute something else than those of flax.nnx, and stay: "
            f"{_list_layers(stay)}",
            stacklevel=2,
        )
    rules = [
        Rule(rule.to, getattr(rule.to, "to_layer", rule.layer))  # type: ignore[arg-type]
        for rule in _drop_in_rules()
    ]
    return _apply_rules(model, rules, where, must_match=False)


def layers(model: Any) -> list[tuple[tuple[str, ...], nnx.Module]]:
    """Lists the Modules of a model, each once, with every path at which it is held.

    Args:
        model: a Module, or a tree of Modules.

    Returns:
        Pairs of paths and Module. A path is made of attribute names and indices, `layers/0`; that
        of the model itself is empty.

    Raises:
        TypeError: the model holds no Module.
    """
    nodes = {id(node): (path, node) for path, node in nnx.iter_graph(model, graph=True)}
    paths: dict[int, list[tuple[Any, ...]]] = {key: [path] for key, (path, _) in nodes.items()}
    for path, node in nodes.values():
        for key, child in _children(node):
            if id(child) in paths and (*path, key) not in paths[id(child)]:
                paths[id(child)].append((*path, key))
    found = [
        (tuple("/".join(map(str, path)) for path in paths[key]), node)
        for key, (_, node) in nodes.items()
        if isinstance(node, nnx.Module)
    ]
    if not found:
        raise TypeError(f"expected a Module or a tree of Modules, got {type(model).__name__}")
    return found


def set_mode(model: Any, mode: Literal["train", "eval"]) -> None:
    """Calls `train` or `eval` of every Module of a model, also of those that override it.

    Args:
        model: a Module, or a tree of Modules.
        mode: the name of the method.
    """
    # Layers may be shared, which a tree may not hold.
    with nnx.set_graph_mode(True):
        for _, module in layers(model):
            getattr(module, mode)()


def _drop_in_rules() -> list[Rule]:
    from flax_customgrad import catalogue  # loads the entries of every family, so only when used

    return [Rule(layer, to) for layer, to in catalogue.drop_ins().items()]


def _is_subclass(rules: Sequence[Rule], layer: nnx.Module) -> bool:
    """Whether a layer is of a user's subclass of a layer that has a drop-in."""
    package = type(layer).__module__.partition(".")[0]
    return package not in ("flax", "flax_customgrad") and any(
        isinstance(layer, rule.layer) for rule in rules
    )


def _rule_of_subclass(rules: Sequence[Rule], cls: type) -> Rule | None:
    """The rule that makes a drop-in of a subclass; None where methods of it would be lost."""
    drop_ins = {rule.layer: rule.to for rule in rules}
    to = next(drop_ins[base] for base in cls.__mro__ if base in drop_ins)
    return None if _lost_methods(cls, to) else Rule(cls, to)  # type: ignore[arg-type]


def _about_subclasses(left: Sequence[Any], subclasses: bool) -> str:
    if subclasses:
        return (
            "convert: these layers have methods of their own, which a drop-in would not run, and "
            f"stay: {_list_layers(left)}"
        )
    return (
        "convert changed nothing: these layers are subclasses of those of flax.nnx, and types "
        f"match exactly: {_list_layers(left)}. Write subclasses=True, or a rule for each type"
    )


def _computes_something_else(layer: nnx.Module) -> bool:
    """Whether a layer is one of this library that replaces a layer of nnx and is no drop-in."""
    from flax_customgrad import catalogue

    drop_ins = catalogue.drop_ins()
    if type(layer) in drop_ins.values() or type(layer).__module__ != "flax_customgrad":
        return False
    return isinstance(layer, (FrozenLinear, *drop_ins))


def _apply_rules(model: Any, rules: Sequence[Rule], where: Where | None, must_match: bool) -> Any:
    found = [(paths, layer) for paths, layer in layers(model) if _matches(where, paths, layer)]
    known = {kind for rule in rules for kind in (rule.layer, rule.to)}
    if where is not None and not any(type(layer) in known for _, layer in found):
        raise ValueError(
            f"where={_format_where(where)} matched no layer that there is a rule for; a regular "
            f"expression must match the whole path. There are {_list_layers(layers(model))}"
        )
    # Every rule is matched before the first layer changes: an error leaves the model as it was.
    plan = [
        (rule, layer)
        for paths, layer in found
        if (rule := _first_matching_rule(rules, paths, layer))
    ]
    if must_match:
        for rule in rules:
            if rule not in {used for used, _ in plan}:
                raise ValueError(
                    f"the rule {rule} matched no layer. Types match exactly, and the first rule "
                    f"that matches wins. There are {_list_layers(layers(model))}"
                )
    for rule in dict.fromkeys(rule for rule, _ in plan):
        _check_target(rule)
    replaced = {}
    frozen: dict[int, FrozenLinear] = {}
    for rule, layer in plan:
        kernel = id(getattr(layer, "kernel", None))
        new = _convert_layer(rule, layer)
        if new is not layer:
            replaced[id(layer)] = new
        if isinstance(new, FrozenLinear) and (first := frozen.setdefault(kernel, new)) is not new:
            new.share(first)
    return _replace_references(model, replaced) if replaced else model


def _first_matching_rule(
    rules: Sequence[Rule], paths: tuple[str, ...], layer: nnx.Module
) -> Rule | None:
    """The first rule that matches a layer."""
    from flax_customgrad import catalogue

    kinds = [type(layer)]
    kinds += [reference for reference, to in catalogue.drop_ins().items() if to is kinds[0]]
    matching = (
        rule
        for kind in kinds
        for rule in rules
        if rule.layer is kind and _matches(rule.where, paths, layer)
    )
    return next(matching, None)


def _check_target(rule: Rule) -> None:
    """Checks that the target of a rule can take a layer, before any layer changes.

    Raises:
        TypeError: it needs arguments, or holds what the layer does not have, or is no target.
    """
    to, name = rule.to, getattr(rule.to, "__name__", repr(rule.to))
    if isinstance(to, type) and issubclass(to, QuantLayer) and not to.has_default_quantizers():
        raise TypeError(
            f"the rule {rule} has nothing to quantize with: write "
            f"{{{_qualified_name(rule.layer)}: lambda layer: {_qualified_name(to)}.from_layer("
            "layer, weight=flax_customgrad.FakeQuant(8, axis=-1))}"
        )
    if _has_own_conversion(rule):
        needed = _required_keywords(to.from_layer)  # type: ignore[union-attr]
        if needed:
            arguments = ", ".join(f"{keyword}=..." for keyword in needed)
            raise TypeError(
                f"the rule {rule}: {name}.from_layer needs {' and '.join(needed)}: write "
                f"{{{_qualified_name(rule.layer)}: lambda layer: "
                f"{_qualified_name(to)}.from_layer(layer, {arguments})}}"
            )
    elif not isinstance(to, type):
        if not callable(to):
            raise TypeError(f"the rule {rule}: expected a class or a function, got {to!r}")
    elif issubclass(rule.layer, to) or _is_drop_in_of_base(rule.layer, to):
        if lost := _lost_methods(rule.layer, to):
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


def _lost_methods(layer: type, to: type) -> list[str]:
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


def _convert_layer(rule: Rule, layer: nnx.Module) -> Any:
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


def _replace_references(model: Any, replaced: Mapping[int, Any]) -> Any:
    """Replaces every reference to an old layer, except those that a new layer itself holds."""
    for _, node in list(nnx.iter_graph(model, graph=True)):
        if id(node) in replaced:
            continue
        for key, child in _children(node):
            if id(child) not in replaced:
                continue
            if isinstance(node, tuple):
                raise TypeError(
                    f"a {type(child).__name__} is held in a tuple, which cannot be changed: hold "
                    "it in an nnx.List"
                )
            if isinstance(node, list | nnx.List | dict):
                node[key] = replaced[id(child)]
            else:
                setattr(node, key, replaced[id(child)])
    return replaced.get(id(model), model)


def _children(node: Any) -> list[tuple[Any, Any]]:
    """The children of a node, by index, key or attribute name."""
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    if isinstance(node, dict):
        return list(node.items())
    return list(vars(node).items()) if isinstance(node, nnx.Pytree) else []


def _matches(where: Where | None, paths: tuple[str, ...], layer: nnx.Module) -> bool:
    """Whether `where` selects a layer, by any of the paths of a shared one."""
    if where is None:
        return True
    if isinstance(where, str | re.Pattern):
        return any(re.fullmatch(where, path) for path in paths)
    return any(where(path, layer) for path in paths)


def _qualified_name(target: Any) -> str:
    """The name of a class or function after its package, which tells nnx's Linear from ours."""
    package = getattr(target, "__module__", "").partition(".")[0]
    return f"{package}.{getattr(target, '__name__', target)}"


def _format_where(where: Where) -> str:
    if isinstance(where, re.Pattern):
        return repr(where.pattern)
    return repr(where) if isinstance(where, str) else getattr(where, "__name__", repr(where))


def _list_layers(found: Sequence[tuple[tuple[str, ...], nnx.Module]]) -> str:
    shown = [
        f"{paths[0] or '(the model)'}: {_qualified_name(type(layer))}"
        for paths, layer in found[:40]
    ]
    return ", ".join(shown) + (f" and {len(found) - 40} more" if len(found) > 40 else "")
