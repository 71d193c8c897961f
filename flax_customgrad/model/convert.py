"""`convert` and `revert`: from the layers of flax.nnx to those of this library, and back.

A drop-in subclasses the layer that it replaces and adds no state, so a layer is converted by
changing its class. The object stays the same, so shared layers stay shared, and the parameters, the
state of an optimizer and checkpoints are untouched. (One drop-in has a conversion of its own:
`WeightNorm` turns the bare arrays that flax 0.12.8 holds as scales into Params.) A function that a
layer holds, such as its activation, is replaced by ours. A user's rule may build a new layer
instead; then every reference to the old layer is replaced.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flax import nnx

from flax_customgrad.contract.compat import is_from_outside_of_trace
from flax_customgrad.low_bit.frozen.frozen_linear import FrozenLinear
from flax_customgrad.model.optimizers import warn_of_stale_optimizers
from flax_customgrad.model.rules import (
    Rule,
    Where,
    check_target,
    convert_layer,
    drop_in_rules,
    first_matching_rule,
    format_where,
    function_rules,
    is_subclass,
    matches,
    qualified_name,
    rule_of_subclass,
)
from flax_customgrad.model.tree import HeldFunction, Paths, children, held_functions, layers

M = TypeVar("M")


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
    are converted already.

    A function of flax.nnx or jax.nn that a layer holds becomes that of this library as well:
    `self.act = nnx.gelu`, an entry of `nnx.Sequential`, of a list, dict or tuple, the function of a
    `functools.partial`, a field of a dataclass such as a config, of which the layer then holds a
    copy. What belongs to a layer of nnx itself stays, as the `attention_fn` of
    `nnx.MultiHeadAttention`, and so does what is held by a class or by another object that is no
    Module. Functions that are called by name are reached by `flax_customgrad.functions`;
    `flax_customgrad.conversion` lists all of them.

    An optimizer goes on. If a rule changes the parameters, as a learned scale does, make the
    optimizer afterwards, or make it anew; `convert((model, optimizer), ...)` warns where that is
    needed. Call it outside of `nnx.jit` and its like; a model that is made and converted inside is
    fine.

    Args:
        model: a Module, or a tree of Modules. It is changed in place.
        where: selects some of the layers: a regular expression that must match the whole path of a
            layer, such as "encoder/.*", or a predicate of path and layer. A path is made of
            attribute names and indices, `blocks/0/up`; that of the model itself is empty. A held
            function is selected by its own path, `blocks/0/act`, and the Module that holds it.
        rules: the replacements, instead of the drop-ins: a mapping from type to class or function,
            or a sequence of `Rule`. The first rule that matches a layer applies. A rule for a layer
            of flax.nnx is one for its drop-in too. `{nnx.relu: f}` replaces a function that layers
            hold.
        subclasses: whether subclasses of the layers of flax.nnx become drop-ins as well. They lose
            their type. One with methods beside its constructor stays, which a warning says.

    Returns:
        The model; a new object only if a rule replaces the model itself.

    Raises:
        ValueError: a rule, or `where`, matches nothing, which the error names; or it is called
            inside of a transformation such as `nnx.jit`, on a model from outside.
        TypeError: the model holds no Module, or the target of a rule cannot replace a layer.

    Warns:
        UserWarning: nothing was converted, for the layers are subclasses of those of flax.nnx; or
            an optimizer beside the model was made for parameters that it no longer has.

    Example:
        >>> import flax_customgrad as fcg
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
        >>> type(fcg.convert(model).layers[0])
        <class 'flax_customgrad.Linear'>
        >>> model.layers[1] is fcg.relu
        True
    """
    if rules is None:
        rules = drop_in_rules()
        kept = [(paths, layer) for paths, layer in layers(model) if is_subclass(rules, layer)]
        if subclasses:
            taken = {type(layer) for _, layer in kept}
            rules += [rule for cls in taken if (rule := rule_of_subclass(rules, cls))]
        rules += function_rules()
        known = _known_kinds(rules)
        left = [(paths, layer) for paths, layer in kept if id(type(layer)) not in known]
        if left and (subclasses or not any(id(t.kind) in known for t in _targets(model))):
            warnings.warn(_about_subclasses(left, subclasses), stacklevel=2)
        return _apply_rules(model, rules, where, must_match=False)
    if isinstance(rules, Mapping):
        rules = [Rule(layer, to) for layer, to in rules.items()]
    return _apply_rules(model, rules, where, must_match=True)


def revert(model: M, *, where: Where | None = None) -> M:
    """Turns the drop-ins of a model back into the layers of flax.nnx, in place.

    The functions that layers hold are those of flax.nnx and jax.nn again.

    Args:
        model: a Module, or a tree of Modules. It is changed in place.
        where: selects some of the layers, as in `convert`.

    Returns:
        The model.

    Raises:
        ValueError: `where` matches nothing; or it is called inside of a transformation such as
            `nnx.jit`, on a model from outside.
        TypeError: the model holds no Module.

    Warns:
        UserWarning: layers of this library stay, which compute something else than those of nnx.
    """
    stay = [
        (paths, layer)
        for paths, layer in layers(model)
        if matches(where, paths, layer) and _computes_something_else(layer)
    ]
    if stay:
        warnings.warn(
            f"revert: these layers compute something else than those of flax.nnx, and stay: "
            f"{_list_layers(stay)}",
            stacklevel=2,
        )
    rules = [
        Rule(rule.to, getattr(rule.to, "to_layer", rule.layer))  # type: ignore[arg-type]
        for rule in (*drop_in_rules(), *function_rules())
    ]
    return _apply_rules(model, rules, where, must_match=False)


@dataclass(frozen=True)
class _Target:
    """What a rule may replace: a layer, or a function that one holds.

    Attributes:
        paths: its paths.
        kind: the type of the layer, or the function.
        module: the layer.
        held: where the function is held; None for a layer.
    """

    paths: Paths
    kind: Any
    module: Any
    held: HeldFunction | None = None


def _targets(model: Any) -> list[_Target]:
    functions = (_Target(f.paths, f.function, f.holder, f) for f in held_functions(model))
    return [*(_Target(paths, type(layer), layer) for paths, layer in layers(model)), *functions]


def _known_kinds(rules: Sequence[Rule]) -> set[int]:
    """The ids of what rules replace, and of what they make; an attribute may not be hashable."""
    return {id(kind) for rule in rules for kind in (rule.layer, rule.to)}


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
    if is_from_outside_of_trace(model):
        raise ValueError(
            "convert and revert are called inside of a transformation such as nnx.jit, on a model "
            "that comes from outside of it. What is done there to the class of a layer does not "
            "come out again: convert the model before, or make it inside"
        )
    found = [t for t in _targets(model) if matches(where, t.paths, t.module)]
    known = _known_kinds(rules)
    if where is not None and not any(id(target.kind) in known for target in found):
        raise ValueError(
            f"where={format_where(where)} matched no layer that there is a rule for; a regular "
            f"expression must match the whole path. There are {_list_layers(layers(model))}"
        )
    # Every rule is matched before the first layer changes: an error leaves the model as it was.
    plan = [
        (rule, target)
        for target in found
        if (rule := first_matching_rule(rules, target.paths, target.kind, target.module))
    ]
    if must_match:
        for rule in rules:
            if rule not in {used for used, _ in plan}:
                raise ValueError(
                    f"the rule {rule} matched no layer. Types match exactly, and the first rule "
                    f"that matches wins. There are {_list_layers(layers(model))}"
                )
    for rule in dict.fromkeys(rule for rule, _ in plan):
        check_target(rule)
    with warn_of_stale_optimizers(model):
        return _carry_out(model, plan)


def _carry_out(model: Any, plan: Sequence[tuple[Rule, _Target]]) -> Any:
    """Replaces functions, then layers; a function may be held by a layer that is replaced."""
    for rule, target in plan:
        if target.held is not None:
            target.held.replace(rule.to)
    replaced = {}
    frozen: dict[int, FrozenLinear] = {}
    for rule, layer in [(rule, target.module) for rule, target in plan if target.held is None]:
        kernel = id(getattr(layer, "kernel", None))
        new = convert_layer(rule, layer)
        if new is not layer:
            replaced[id(layer)] = new
        if isinstance(new, FrozenLinear) and (first := frozen.setdefault(kernel, new)) is not new:
            new.share(first)
    return _replace_references(model, replaced) if replaced else model


def _replace_references(model: Any, replaced: Mapping[int, Any]) -> Any:
    """Replaces every reference to an old layer, except those that a new layer itself holds."""
    for _, node in list(nnx.iter_graph(model, graph=True)):
        if id(node) in replaced:
            continue
        for key, child in children(node):
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


def _list_layers(found: Sequence[tuple[tuple[str, ...], nnx.Module]]) -> str:
    shown = [
        f"{paths[0] or '(the model)'}: {qualified_name(type(layer))}" for paths, layer in found[:40]
    ]
    return ", ".join(shown) + (f" and {len(found) - 40} more" if len(found) > 40 else "")
