"""`convert` and `revert`: from the layers of flax.nnx to those of this library, and back.

A drop-in subclasses the layer whose place it takes and adds no state, so a layer is converted by
changing what it *is*: its class. The object stays, so layers that are shared stay shared, and the
parameters, an optimizer's state and any checkpoint are untouched. (One drop-in has a conversion of
its own: `WeightNorm` makes Params of the bare arrays that flax 0.12.8 has for scales.) A rule of
the user's may build a new layer instead; then each place that holds the old one is made to hold the
new one.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flax import nnx

from flax_customgrad.contract.compat import set_class

M = TypeVar("M")

Where = str | re.Pattern[str] | Callable[[str, nnx.Module], bool]
"""Which layers: a regular expression for the whole path, or a predicate of path and layer."""


@dataclass(frozen=True)
class Rule:
    """What becomes of the layers of one type.

    Attributes:
        layer: the exact type of the layers; a subclass is another type.
        to: a class with a constructor `from_layer(layer)`, or a subclass of `layer` that holds
            the same state, or a function from the layer to another.
        where: narrows the layers by path: a regular expression that must match the whole path,
            such as "encoder/.*", or a predicate of path and layer.
    """

    layer: type
    to: Callable[..., Any]
    where: Where | None = None

    def __str__(self) -> str:
        narrowed = "" if self.where is None else f" where {_shown(self.where)}"
        return f"{_named(self.layer)} -> {_named(self.to)}{narrowed}"


def convert(
    model: M,
    *,
    where: Where | None = None,
    rules: Mapping[type, Callable[..., Any]] | Sequence[Rule] | None = None,
) -> M:
    """Gives the layers of a model the hand-written backwards of this library.

    Without rules, every layer whose exact type is one of flax.nnx that has a drop-in becomes that
    drop-in, in place. Layers of other types, subclasses and converted ones among them, are left.

    Args:
        model: a Module, or a tree of them. It is changed in place.
        where: narrows the layers: a regular expression that must match a layer's whole path, such
            as "encoder/.*", or a predicate of path and layer. A path is made of attribute names
            and indices, `layers/0/kernel`; that of the model itself is empty.
        rules: what becomes of which layers, instead of the drop-ins: a mapping from type to class
            or function, or a sequence of `Rule`. The first rule that matches a layer wins.

    Returns:
        The model; a new object only where a rule builds one for the model itself.

    Raises:
        ValueError: a rule, or `where`, matched no layer; the error names it.
        TypeError: the model is no Module, or a rule's target cannot take a layer.

    Example:
        >>> import flax_customgrad as fcg
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
        >>> type(fcg.convert(model).layers[0])
        <class 'flax_customgrad.linear.linear.Linear'>
    """
    if rules is None:
        return _replace(model, _drop_in_rules(), where, must_match=False)
    if isinstance(rules, Mapping):
        rules = [Rule(layer, to) for layer, to in rules.items()]
    return _replace(model, rules, where, must_match=True)


def revert(model: M, *, where: Where | None = None) -> M:
    """Turns the drop-ins of a model back into the layers of flax.nnx, in place.

    Args:
        model: a Module, or a tree of them.
        where: narrows the layers, as in `convert`.

    Returns:
        The model.

    Raises:
        ValueError: `where` matched no layer.
        TypeError: the model is no Module.
    """
    rules = [
        Rule(rule.to, getattr(rule.to, "to_layer", rule.layer))  # type: ignore[arg-type]
        for rule in _drop_in_rules()
    ]
    return _replace(model, rules, where, must_match=False)


def layers(model: Any) -> list[tuple[tuple[str, ...], nnx.Module]]:
    """The modules of a model, each once, with the paths at which it is found.

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


def _drop_in_rules() -> list[Rule]:
    from flax_customgrad import catalogue  # which imports every family: only where it is used

    return [Rule(layer, to) for layer, to in catalogue.drop_ins().items()]


def _replace(model: Any, rules: Sequence[Rule], where: Where | None, must_match: bool) -> Any:
    found = [(paths, layer) for paths, layer in layers(model) if _selects(where, paths, layer)]
    known = {kind for rule in rules for kind in (rule.layer, rule.to)}
    if where is not None and not any(type(layer) in known for _, layer in found):
        raise ValueError(
            f"where={_shown(where)} matched no layer that there is a rule for; a regular "
            f"expression must match the whole path. There are {_listed(layers(model))}"
        )
    # Every rule is matched before the first layer changes: an error leaves the model as it was.
    plan = [(rule, layer) for paths, layer in found if (rule := _first(rules, paths, layer))]
    if must_match:
        for rule in rules:
            if rule not in {used for used, _ in plan}:
                raise ValueError(
                    f"the rule {rule} matched no layer. Types match exactly, and the first rule "
                    f"that matches wins. There are {_listed(layers(model))}"
                )
    replaced = {}
    for rule, layer in plan:
        new = _apply(rule, layer)
        if new is not layer:
            replaced[id(layer)] = new
    return _rewire(model, replaced) if replaced else model


def _first(rules: Sequence[Rule], paths: tuple[str, ...], layer: nnx.Module) -> Rule | None:
    """The first rule that matches a layer."""
    matching = (r for r in rules if type(layer) is r.layer and _selects(r.where, paths, layer))
    return next(matching, None)


def _apply(rule: Rule, layer: nnx.Module) -> Any:
    """What a rule makes of a layer: the same object of another class, or another object."""
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


def _rewire(model: Any, replaced: Mapping[int, Any]) -> Any:
    """Puts new objects wherever the old ones are held; a new layer may hold the old one itself."""
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
    """What a node holds: by index, by key, or by attribute."""
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    if isinstance(node, dict):
        return list(node.items())
    return list(vars(node).items()) if isinstance(node, nnx.Pytree) else []


def _selects(where: Where | None, paths: tuple[str, ...], layer: nnx.Module) -> bool:
    """Whether a layer is meant; one that is shared has several paths, and any of them will do."""
    if where is None:
        return True
    if isinstance(where, str | re.Pattern):
        return any(re.fullmatch(where, path) for path in paths)
    return any(where(path, layer) for path in paths)


def _named(target: Any) -> str:
    """A class or function with the package it is from, which tells nnx.Linear from ours."""
    package = getattr(target, "__module__", "").partition(".")[0]
    return f"{package}.{getattr(target, '__name__', target)}"


def _shown(where: Where) -> str:
    if isinstance(where, re.Pattern):
        return repr(where.pattern)
    return repr(where) if isinstance(where, str) else getattr(where, "__name__", repr(where))


def _listed(found: Sequence[tuple[tuple[str, ...], nnx.Module]]) -> str:
    shown = [f"{paths[0] or '(the model)'}: {_named(type(layer))}" for paths, layer in found[:40]]
    return ", ".join(shown) + (f" and {len(found) - 40} more" if len(found) > 40 else "")
