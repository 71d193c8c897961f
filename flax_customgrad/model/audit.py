"""`audit`: what the backward of a model keeps, layer by layer, with flax.nnx and with ours.

The rows are those of `conversion`. The bytes come from a trace of the whole model, in which each
array that is kept belongs to the layer that reads it in the backward; so they add up to what
`residual_bytes` counts, whatever loops and `remat` the model runs its layers in.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.autodiff import use_autodiff
from flax_customgrad.model.audit_report import AS_IT_IS, NNX, OURS, Audit, AuditRow
from flax_customgrad.model.conversion import (
    STACK,
    function_names,
    function_rows,
    import_rows,
    layer_rows,
)
from flax_customgrad.model.conversion_report import ConversionRow
from flax_customgrad.model.functions import functions
from flax_customgrad.model.parts import Part, Parts
from flax_customgrad.model.residual_readers import KeptArray, kept_by_parts
from flax_customgrad.model.traced_model import TracedModel, both_forms
from flax_customgrad.model.tree import layers


def audit(
    model: Any,
    *inputs: Any,
    call: Callable[..., Any] | None = None,
    compiled: bool = False,
    **keywords: Any,
) -> Audit:
    """Lists the layers of a model in call order, and what the backward keeps for each.

    An array is kept for the layer whose backward reads it. Where several do, it counts once: with
    the first of those that take it as an input. Parameters, and the inputs of the model, are held
    anyway and do not count.

    The model is traced three times: as it is; with the layers of flax.nnx inside of `use_autodiff`;
    and converted, inside of `functions`. It is not changed, and nothing is computed.

    Args:
        model: a Module, or a tree of Modules, converted or not.
        *inputs: what the model is called with: trees of arrays, of their shapes and dtypes, and of
            other values, which are static.
        call: a function of the model and the inputs, such as a loss; `model(*inputs, **keywords)`
            by default.
        compiled: whether to compile the value and gradient too, and report the temporary memory
            that XLA needs for it. It takes as long as compiling two steps of training.
        **keywords: inputs that are passed by name.

    Returns:
        A report, which prints as a table.

    Raises:
        TypeError: the model holds no Module, or there is nothing to call it with.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> model = nnx.Sequential(
        ...     nnx.Linear(8, 32, rngs=nnx.Rngs(0)), nnx.gelu, nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
        >>> report = fcg.audit(model, jnp.ones((4, 8)))
        >>> [row.path for row in report.rows]
        ['layers/0', 'layers/1', 'layers/2']
        >>> report.kept["ours"] < report.kept["flax.nnx"]
        True
    """
    layers(model)
    if not inputs and not keywords and call is None:
        raise TypeError(
            "audit traces the model, and needs what it is called with: write "
            "audit(model, x), or audit(model, call=lambda model: ...)"
        )
    traced, parts = TracedModel(call, inputs, keywords), Parts()
    theirs, ours = both_forms(model)
    forms = {AS_IT_IS: nnx.clone(model, graph=True), NNX: theirs, OURS: ours}
    traces = {form: _trace(traced, parts, form, of) for form, of in forms.items()}
    return Audit(
        name=type(model).__name__,
        rows=tuple(_rows(model, parts.order, traces)),
        imports=tuple(f"{row.paths[0]} is {row.remark}" for row in import_rows(model)),
        temporary_bytes=_temporary_bytes(traced, model) if compiled else {},
    )


# Traces


class _Trace(NamedTuple):
    """A model traced in one of its forms: what is kept, recomputed by a remat, and called."""

    arrays: list[KeptArray]
    rematted: frozenset[int]
    called: set[Part]


def _trace(traced: TracedModel, parts: Parts, form: str, model: Any) -> _Trace:
    with _context(form), parts.traced(model, with_functions=form == OURS) as called:
        arrays, rematted = kept_by_parts(*traced.function(model))
    return _Trace(arrays, rematted, called)


def _context(form: str) -> AbstractContextManager[Any]:
    return use_autodiff() if form == NNX else nullcontext()


def _temporary_bytes(traced: TracedModel, model: Any) -> dict[str, int]:
    """The temporary memory of the compiled value and gradient, with flax.nnx and with ours."""
    theirs, ours = both_forms(model)
    with _context(NNX):
        found = {NNX: _compiled_bytes(*traced.function(theirs))}
    with functions():
        return {**found, OURS: _compiled_bytes(*traced.function(ours))}


def _compiled_bytes(fn: Callable[..., Any], *args: Any) -> int:
    leaves, tree = jax.tree.flatten(args)
    floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def loss(wrt: list[Any], leaves: list[Any]) -> jax.Array:
        given = dict(zip(floats, wrt, strict=True))
        merged = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
        outs = [out for out in fn(*jax.tree.unflatten(tree, merged)) if _is_real(out)]
        return sum((jnp.sum(out.astype(jnp.float32)) for out in outs), jnp.zeros(()))

    step = jax.jit(jax.value_and_grad(loss)).lower([leaves[i] for i in floats], leaves)
    return step.compile().memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]


def _is_real(out: jax.Array) -> bool:
    return jnp.issubdtype(out.dtype, jnp.floating)


# Rows

_Owners = Mapping[str, defaultdict[Part, Counter[str]]]
"""For each form of a model and part of it the bytes that are kept, by the user's line."""


def _rows(model: Any, order: Sequence[Part], traces: Mapping[str, _Trace]) -> Iterator[AuditRow]:
    """The rows of what was called, in call order; of what was not; and of what is outside."""
    found = _layers_and_functions(model)
    found |= {part: _call_row(part) for part in order if part.kind == "call"}
    owners = {form: _by_owner(trace, order, found) for form, trace in traces.items()}
    folded = _folded(found, traces)
    for owned in owners.values():
        for part, into in folded.items():
            owned[into] += owned.pop(part, Counter())
    rematted = {order[k] for trace in traces.values() for k in trace.rematted}
    remats = dict.fromkeys(p for owned in owners.values() for p in owned if p.kind == "remat")
    called = [part for part in order if part in found]
    for part in [*called, *(part for part in found if part not in order)]:
        for remat in [remat for remat in remats if _is_within(part.path, remat.path)]:
            del remats[remat]
            yield _remat_row(remat, owners)
        is_rematted = part in rematted
        remarks = [
            # Of a stack that keeps nothing there is nothing to count.
            *(r for r in found[part].remark.split("; ") if not (is_rematted and STACK in r)),
            f"counted with its {found[folded[part]].name}" if part in folded else "",
            "recomputed" if is_rematted else "",
            "" if part in order else "not called",
        ]
        kept = _sums(owners, [part]) if part in order and part not in folded else {}
        # What a function of the user calls has rows of its own.
        if found[part].kind != "function" or found[part].drop_in or any(kept.values()):
            yield _row(found[part], remarks, kept)
    yield from (_remat_row(remat, owners) for remat in remats)
    yield from _outside_rows(model, found, owners)


def _row(row: ConversionRow, remarks: Sequence[str], kept: Mapping[str, int]) -> AuditRow:
    return AuditRow(
        path=", ".join(map(_shown, row.paths)),
        kind=row.kind,
        name=row.drop_in if row.is_converted else row.name,
        drop_in=row.drop_in,
        is_ours=row.is_converted,
        remark="; ".join(filter(None, remarks)),
        kept=kept,
    )


def _layers_and_functions(model: Any) -> dict[Part, ConversionRow]:
    """The rows of `conversion`, by part."""
    rows = {Part("module", row.paths[0]): row for row in layer_rows(model)}
    return rows | {Part("function", row.paths[0]): row for row in function_rows(model)}


def _call_row(part: Part) -> ConversionRow:
    theirs, _ = function_names()
    names = next(names for names in theirs.values() if names[1] == part.name)
    return ConversionRow((part.path,), "call", *names)


def _by_owner(
    trace: _Trace, order: Sequence[Part], found: Container[Part]
) -> defaultdict[Part, Counter[str]]:
    """The bytes that are kept for each part, by the user's line that reads them."""
    owned: defaultdict[Part, Counter[str]] = defaultdict(Counter)
    for array in trace.arrays:
        owned[_owner(array, order, found)][array.line] += array.nbytes
    return owned


def _owner(array: KeptArray, order: Sequence[Part], found: Container[Part]) -> Part:
    """The part that an array is kept for."""
    # The output of a layer that another takes as its input is kept for that one.
    readers = array.read_by - {array.made_by} or array.read_by
    if readers:
        return order[min(readers, key=lambda k: (order[k] not in found, k))]
    if array.rematted:
        return Part("remat", _common_path([order[k].path for k in array.rematted]))
    return Part("module", "") if array.made_by is None else order[array.made_by]


def _common_path(paths: Sequence[str]) -> str:
    split = [path.split("/") for path in paths]
    same = (names[0] for names in zip(*split, strict=False) if len(set(names)) == 1)
    return "/".join(same)


def _folded(found: Iterable[Part], traces: Mapping[str, _Trace]) -> dict[Part, Part]:
    """Layers that are called in one form alone, and the layer that holds them.

    The RNN of this library computes what its cell does, so only both together can be compared.
    """
    theirs, ours = traces[NNX].called, traces[OURS].called
    folded = {}
    for part in found:
        if part.kind == "module" and (part in theirs) != (part in ours):
            names = part.path.split("/")
            holders = (Part("module", "/".join(names[:k])) for k in range(len(names) - 1, -1, -1))
            into = next((h for h in holders if h in found and h in theirs and h in ours), None)
            if into is not None:
                folded[part] = into
    return folded


def _remat_row(part: Part, owners: _Owners) -> AuditRow:
    """What a remat keeps."""
    kept = _sums(owners, [part])
    return AuditRow(_shown(part.path), "remat", "nnx.remat", "", False, "keeps its inputs", kept)


def _outside_rows(model: Any, found: Container[Part], owners: _Owners) -> Iterator[AuditRow]:
    """What is kept outside of all layers: a row for each class of Modules that it is kept in."""
    classes = {paths[0]: type(module).__qualname__ for paths, module in layers(model)}
    held: defaultdict[str, list[Part]] = defaultdict(list)
    for part in dict.fromkeys(part for owned in owners.values() for part in owned):
        if part not in found and part.kind != "remat":
            held[classes.get(part.path, "")].append(part)
    for name, parts in held.items():
        lines = sum((owned[part] for owned in owners.values() for part in parts), Counter())
        most = [line for line, _ in lines.most_common(2) if line]
        remark = f"most of it at {', '.join(most)}" if most else ""
        kept = _sums(owners, parts)
        if any(kept.values()):
            where = f"in {name}" if name else ""
            yield AuditRow("outside of layers", "outside", where, "", False, remark, kept)


def _sums(owners: _Owners, parts: Sequence[Part]) -> dict[str, int]:
    """The bytes of some parts, in each form."""
    return {form: sum(owned[part].total() for part in parts) for form, owned in owners.items()}


def _is_within(path: str, holder: str) -> bool:
    return not holder or path == holder or path.startswith(f"{holder}/")


def _shown(path: str) -> str:
    return path or "(the model)"
