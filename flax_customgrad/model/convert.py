"""`convert` and `revert`: from the layers of flax.nnx to those of this library, and back.

A drop-in subclasses the layer that it replaces and adds no state, so a layer is converted by
changing its class. The object stays the same, so shared layers stay shared, and the parameters, the
state of an optimizer and checkpoints are untouched. (One drop-in has a conversion of its own:
`WeightNorm` turns the bare arrays that flax 0.12.8 holds as scales into Params.) A user's rule may
build a new layer instead; then every reference to the old layer is replaced.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from flax import nnx

from flax_customgrad.contract.compat import set_class
from flax_customgrad.low_bit.frozen.frozen_linear import FrozenLinear

M = TypeVar("M")

Where = str | re.Pattern[str] | Callable[[str, nnx.Module], bool]
"""Selects layers: a regular expression for the whole path, or a predicate of path and layer."""


@dataclass(frozen=True)
class Rule:
    """How `convert` replaces the layers of one type.

    Attributes:
        layer: the exact type of the layers; a subclass does not match.
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
) -> M:
    """Gives the layers of a model the hand-written backwards of this library.

    Without rules, every layer whose exact type is one of flax.nnx that has a drop-in becomes that
    drop-in, in place. Layers of other types stay as they are, among them subclasses and layers that
    are converted already.

    Args:
        model: a Module, or a tree of Modules. It is changed in place.
        where: selects some of the layers: a regular expression that must match the whole path of a
            layer, such as "encoder/.*", or a predicate of path and layer. A path is made of
            attribute names and indices, `blocks/0/up`; that of the model itself is empty.
        rules: the replacements, instead of the drop-ins: a mapping from type to class or function,
            or a sequence of `Rule`. The first rule that matches a layer applies.

    Returns:
        The model; a new object only if a rule replaces the model itself.

    Raises:
        ValueError: a rule, or `where`, matches no layer; the error names it.
        TypeError: the model holds no Module, or the target of a rule cannot replace a layer.

    Example:
        >>> import flax_customgrad as fcg
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
        >>> type(fcg.convert(model).layers[0])
        <class 'flax_customgrad.Linear'>
    """
    if rules is None:
        return _apply_rules(model, _drop_in_rules(), where, must_match=False)
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
    """
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
    matching = (r for r in rules if type(layer) is r.layer and _matches(r.where, paths, layer))
    return next(matching, None)


def _convert_layer(rule: Rule, layer: nnx.Module) -> Any:
    """Converts a layer by a rule: the same object with another class, or a new object."""
    to = rule.to
    if hasattr(to, "from_layer"):
        return to.from_layer(layer)  # type: ignore[union-attr]
    if isinstance(to, type):
        if not (issubclass(to, rule.layer) or issubclass(rule.layer, to)):
            raise TypeError(
                f"the rule {rule}: {to.__name__} has no `from_layer` and is no subclass of "
                f"{rule.layer.__name__}; give it a class method from_layer(layer), or write a "
                "function from the layer to a new one"
            )
        set_class(layer, to)
        return layer
    if not callable(to):
        raise TypeError(f"the rule {rule}: expected a class or a function, got {to!r}")
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
