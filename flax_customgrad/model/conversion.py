"""`conversion`: what `convert` has made of each layer and function of a model, or would make.

The rows of layers and held functions are read off the model. With example inputs the model is
traced as well: which functions it calls by name, and how many bytes its backward keeps.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any

import jax
from flax import nnx

from flax_customgrad.contract.residuals import residual_bytes
from flax_customgrad.layers.replaced_matmul import injected_operations
from flax_customgrad.layers.stacked import stack_axes
from flax_customgrad.model.conversion_report import Conversion, ConversionRow
from flax_customgrad.model.functions import counting_calls, functions
from flax_customgrad.model.rules import Rule, drop_in_rules, is_subclass, lost_methods
from flax_customgrad.model.traced_model import TracedModel, both_forms
from flax_customgrad.model.tree import held_functions, is_of_user, layers, path_order
from flax_customgrad.numerics.interception import products_are_intercepted


def conversion(
    model: Any, *example_inputs: Any, call: Callable[..., Any] | None = None
) -> Conversion:
    """Lists what `convert` has made of each layer of a model, or would make, and why one stays.

    With example inputs it lists the functions that are called by name too, which are ours inside of
    `flax_customgrad.functions`, and counts what the backward keeps. The model is traced several
    times for that, and nothing is computed. It is not changed.

    Args:
        model: a Module, or a tree of Modules, converted or not.
        *example_inputs: what the model is called with: trees of arrays, of their shapes and dtypes,
            and of other values, which are static.
        call: a function of the model and the inputs, such as a loss; `model(*inputs)` by default.

    Returns:
        A report, which prints as a table.

    Raises:
        TypeError: the model holds no Module.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> model = nnx.Sequential(
        ...     nnx.Linear(8, 32, rngs=nnx.Rngs(0)), nnx.gelu, lambda x: nnx.softmax(x))
        >>> print(fcg.conversion(model))
        path      in flax.nnx  result
        layers/0  nnx.Linear   would become fcg.Linear
        layers/1  nnx.gelu     would become fcg.gelu
        layers/2  <lambda>     stays: no function of flax.nnx or jax.nn with a drop-in
        Nothing is converted. Layers: 1 to convert. Functions: 1 to convert, 1 stays.
        >>> report = fcg.conversion(model, jnp.ones((4, 8)))
        >>> report.rows[-1].name
        'nnx.softmax'
        >>> report.kept_bytes["converted"] < report.kept_bytes["flax.nnx"]
        True
    """
    rows = [*layer_rows(model), *function_rows(model)]
    kept = {}
    if example_inputs or call is not None:
        traced = TracedModel(call, example_inputs)
        rows += _call_rows(model, traced)
        kept = _kept_bytes(model, traced)
    return Conversion((*rows, *import_rows(model)), kept)


# Layers

STACK = "a stack of"
"""How the remark on a stacked layer begins."""


def layer_rows(model: Any) -> Iterator[ConversionRow]:
    """A row for each layer of a model, sorted by path."""
    rules = drop_in_rules()
    for paths, layer in sorted(layers(model), key=lambda item: path_order(item[0][0])):
        if _is_layer(layer):
            name, drop_in, is_converted, remarks = _fate(rules, layer)
            if axes := _stack_axes(layer):
                remarks = [*remarks, f"{STACK} {' x '.join(map(str, axes))}"]
            yield ConversionRow(paths, "layer", name, drop_in, is_converted, "; ".join(remarks))


def _is_layer(module: nnx.Module) -> bool:
    """Whether a Module computes something itself, and does not only hold those that do."""
    if is_of_user(type(module)):
        return any(_is_of_nn(base) for base in type(module).__mro__) or any(
            isinstance(value, nnx.Variable) for value in vars(module).values()
        )
    return _is_of_nn(type(module))


def _is_of_nn(cls: type) -> bool:
    is_ours = cls.__module__.startswith("flax_customgrad") and issubclass(cls, nnx.Module)
    return cls.__module__.startswith("flax.nnx.nn.") or (is_ours and not is_of_user(cls))


def _fate(rules: Sequence[Rule], layer: nnx.Module) -> tuple[str, str, bool, list[str]]:
    """The name of a layer in nnx, its drop-in, whether it is that already, and remarks."""
    cls = type(layer)
    for rule in rules:
        if cls in (rule.layer, rule.to):
            names = _class_name(rule.layer), _class_name(rule.to)
            return *names, cls is rule.to, _left_to_nnx(layer)
    if not is_subclass(rules, layer):
        if cls.__module__.startswith("flax_customgrad"):
            return _class_name(cls), _class_name(cls), True, []
        reason = "no layer of flax.nnx" if is_of_user(cls) else "there is no drop-in"
        return _class_name(cls), "", False, [reason]
    by_base = {kind: rule for rule in rules for kind in (rule.layer, rule.to)}
    base = next(base for base in cls.__mro__ if base in by_base)
    about = f"a subclass of {_class_name(base)}"
    if base is by_base[base].to:
        return cls.__qualname__, _class_name(base), True, [about]
    lost = lost_methods(cls, by_base[base].to)  # type: ignore[arg-type]
    about += f", with {', '.join(lost)} of its own" if lost else "; write subclasses=True"
    return cls.__qualname__, "", False, [about]


def _left_to_nnx(layer: Any) -> list[str]:
    """Why a drop-in computes as the layer of nnx does, as far as the layer itself tells."""
    if injected := injected_operations(layer):
        return [f"computes as flax.nnx, for it was given its own {', '.join(injected)}"]
    if hasattr(layer, "kernel") and products_are_intercepted():
        return ["computes as flax.nnx, while something replaces the products of JAX"]
    return []


_WITH_WEIGHTS = (
    nnx.Linear,
    nnx.LinearGeneral,
    nnx.Einsum,
    nnx.Conv,
    nnx.ConvTranspose,
    nnx.Embed,
)


def _stack_axes(layer: Any) -> tuple[int, ...]:
    """The axes along which a layer is stacked, where its arguments tell; () where it is not."""
    if isinstance(layer, _WITH_WEIGHTS):
        return stack_axes(layer)
    scale = getattr(layer, "scale", None)
    return tuple(scale.shape[:-1]) if hasattr(layer, "num_features") and scale is not None else ()


def _class_name(cls: Any) -> str:
    return {"flax": "nnx.", "flax_customgrad": "fcg."}.get(cls.__module__.partition(".")[0], "") + (
        cls.__qualname__
    )


# Functions


def function_names() -> tuple[dict[int, tuple[str, str]], ...]:
    """The names of functions in flax.nnx or jax.nn and in this library, by id: theirs, and ours."""
    from flax_customgrad import catalogue

    theirs: dict[int, tuple[str, str]] = {}
    ours: dict[int, tuple[str, str]] = {}
    for entry in catalogue.entries():
        if entry.is_function and entry.reference is not None:
            names = entry.stands_for, f"fcg.{entry.name}"
            theirs.setdefault(id(entry.reference), names)
            ours.setdefault(id(entry.module), names)
    return theirs, ours


def function_rows(model: Any) -> Iterator[ConversionRow]:
    """A row for each function that the Modules of a model hold, sorted by path."""
    theirs, ours = function_names()
    for held in sorted(held_functions(model), key=lambda held: path_order(held.paths[0])):
        function, known = held.function, id(held.function)
        if known in theirs or known in ours:
            names = theirs.get(known) or ours[known]
            yield ConversionRow(held.paths, "function", *names, known in ours)
        elif not held.is_in_config:  # every layer may hold a config, and that initializers
            name = _short_name(getattr(function, "__qualname__", type(function).__qualname__))
            reason = "no function of flax.nnx or jax.nn with a drop-in"
            yield ConversionRow(held.paths, "function", name, remark=reason)


def _short_name(qualified: str) -> str:
    """The name of a function without those of the functions that define it."""
    return qualified.rpartition("<locals>.")[2]


def import_rows(model: Any) -> list[ConversionRow]:
    """Functions whose names the classes of a user have imported, so that nothing reaches them."""
    (theirs, _), found = function_names(), set()
    classes = {cls for _, layer in layers(model) for cls in type(layer).__mro__ if is_of_user(cls)}
    for method in (inspect.unwrap(method) for cls in classes for method in vars(cls).values()):
        known = getattr(method, "__globals__", {})
        for name in _names_in(getattr(method, "__code__", None)) & set(known):
            if id(known[name]) in theirs:
                found.add((f"{known.get('__name__')}.{name}", theirs[id(known[name])]))
    return [
        ConversionRow((path,), "import", name, remark=f"imported by name; write {name} or {ours}")
        for path, (name, ours) in sorted(found)
    ]


def _names_in(code: CodeType | None) -> set[str]:
    """The global names that a function looks up, and the functions inside of it."""
    if code is None:
        return set()
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


# Traces


def _call_rows(model: Any, traced: TracedModel) -> list[ConversionRow]:
    """A row for each function that is called by name, and caller."""
    theirs, _ = function_names()
    with counting_calls() as calls:
        jax.eval_shape(*traced.function(model))
    return [
        ConversionRow((_short_name(caller),), "call", *theirs[id(function)], remark=_times(count))
        for (function, caller), count in calls.counts.items()
    ]


def _kept_bytes(model: Any, traced: TracedModel) -> dict[str, int]:
    """The bytes that the backward keeps, of the model in each of its forms."""
    theirs, ours = both_forms(model)
    kept = {
        form: residual_bytes(*traced.function(of))
        for form, of in {"as it is": model, "flax.nnx": theirs, "converted": ours}.items()
    }
    with functions():
        inside = residual_bytes(*traced.function(ours))
    return {**kept, "converted, inside fcg.functions()": inside}


def _times(count: int) -> str:
    return "" if count == 1 else f"{count} times"
