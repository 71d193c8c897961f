"""The page of a layer, made of what is known of it.

That is its entry in the catalogue, its docstring, the docstrings of the files that hold its
mathematics, what its backward keeps, which is traced, and the measurements in `docs/data`.
"""

import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import kept_bytes
import mathematics
import pictures
from docstrings import escaped
from layer_files import mathematics_of, module_of
from methods import documented_methods
from sources import link

from flax_customgrad import BackwardStateError, catalogue
from flax_customgrad.command.measurements import provenance

_PACKAGE = "flax_customgrad"
FOLDERS = ("layers", "functions")
_GRADIENTS = {
    "exact": "exact: the derivative of the function",
    "surrogate": "surrogate: it differs from the derivative on purpose",
}


def page_of(entry: catalogue.Entry) -> str:
    """The name of a layer's page, from the root of the documentation.

    Modules and functions have a folder each: `Dropout` and `dropout` would be one file where case
    is not told apart.
    """
    return f"{FOLDERS[entry.is_function]}/{entry.name}"


@dataclass(frozen=True)
class Measurements:
    """What was measured on one machine and committed, by layer.

    Attributes:
        checks: the summary of `check --json`, or {}.
        benchmarks: that of `bench --json`, or {}.
    """

    checks: dict[str, Any]
    benchmarks: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Measurements":
        """Reads `checks.json` and `layers.json`; one that is not there is empty."""

        def read(name: str) -> dict[str, Any]:
            path = folder / name
            return json.loads(path.read_text()) if path.exists() else {}

        return cls(read("checks.json"), read("layers.json"))


def page(entry: catalogue.Entry, measured: Measurements) -> str:
    """The page of a layer, as reStructuredText.

    Args:
        entry: the layer.
        measured: the measurements of all layers.
    """
    own, *others = mathematics_of(entry)
    sections = (
        _title(entry.name.removeprefix("surrogate."), "="),
        _facts(entry, own),
        *_graphs(entry),
        _title("Reference", "-"),
        _directive(entry),
        _title("Mathematics", "-"),
        *_typeset(own, entry),
        *(part for module in others for part in _operation(module, entry)),
        *_kept(entry),
        *_checks(entry, measured.checks),
        *_benchmark(entry, measured.benchmarks),
    )
    return "\n".join(section.rstrip("\n") + "\n" for section in sections)


def _title(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def _facts(entry: catalogue.Entry, own: ModuleType) -> str:
    """The first lines: what the layer replaces, and what the catalogue says of it."""
    if entry.is_drop_in:
        by = "functions" if entry.is_function else "convert"
        lead = f"Replaces ``{entry.stands_for}``; :func:`~flax_customgrad.{by}` puts it in place."
    else:
        what = "function" if entry.is_function else "layer"
        lead = f"A {what} without a counterpart in ``flax.nnx``."
    facts = {
        "Family": f":doc:`/families/{entry.family}`",
        "Gradient": _GRADIENTS[entry.gradient],
        "The backward keeps": escaped(entry.keeps),
        "Against nnx" if entry.is_drop_in else "Purpose": escaped(entry.gain),
        "Paper" if "arXiv" in entry.source else "Source": _linked(entry.source),
        "File": _file(own),
        "In the same file": ", ".join(
            f":doc:`{other.name} </{page_of(other)}>`"
            for other in catalogue.entries()
            if other is not entry and module_of(other) is own
        ),
    }
    rows = "\n".join(f":{label}: {fact}" for label, fact in facts.items() if fact)
    note = ""
    if re.search(r"\d MB -> \d", entry.gain):
        note = (
            "\nA pair such as *453 MB -> 168* is the memory of the gradient of eight layers in a "
            "``lax.scan``, without and with this backward; :doc:`/gallery` has their inputs.\n"
        )
    return f"{lead}\n\n.. rst-class:: facts\n\n{rows}\n{note}"


def _linked(source: str) -> str:
    text, address = link(source)
    return f"`{text} <{address}>`__" if address else escaped(text)


def _file(module: ModuleType) -> str:
    """A link to the source of a module, on the page that viewcode makes of it."""
    path = module.__name__.replace(".", "/")
    return f"`{path}.py <../_modules/{path}.html>`__"


def _directive(entry: catalogue.Entry) -> str:
    """The directive of autodoc, with the methods that the library documents."""
    if entry.is_function:
        return f".. autofunction:: {_PACKAGE}.{entry.name}\n"
    methods = ", ".join(documented_methods(entry.module))
    options = f"   :members: {methods}\n" if methods else ""
    return f".. autoclass:: {_PACKAGE}.{entry.name}\n{options}"


def _graphs(entry: catalogue.Entry) -> Iterator[str]:
    """Graphs of the function and its gradient, where it is one of a single number."""
    if entry.curves:
        graphs = "".join(pictures.graph(curve, case) for case, curve in entry.curves.items())
        yield _raw(f'<div class="graphs">{graphs}</div>{pictures.LEGEND}')


def _kept(entry: catalogue.Entry) -> Iterator[str]:
    """What stays in memory, as bars."""
    try:
        kept = kept_bytes.measure(entry)
    except BackwardStateError:  # It needs the arrays themselves.
        kept = None
    if kept is None:
        return
    yield _title("Memory", "-")
    beyond = "beyond its inputs and parameters"
    of = f"of the workload *{escaped(kept.workload)}*"
    if kept.by_autodiff is None:
        yield f"What the backward {of} keeps, {beyond}; the bar of the inputs is for comparison.\n"
        rows = [("the inputs", kept.inputs), ("kept", kept.ours)]
    elif kept.ours == kept.by_autodiff == 0:
        yield f"The backward {of} keeps nothing {beyond}; nor does that of JAX.\n"
        return
    else:
        theirs = entry.stands_for or "autodiff"
        yield (
            f"What the backward {of} keeps {beyond}, before XLA optimizes: that is what "
            "stays in memory under ``lax.scan`` and from one ``jit`` to the next.\n"
        )
        rows = [(theirs, kept.by_autodiff), (f"fcg.{entry.name}", kept.ours)]
    yield _raw(pictures.bars(rows))


def _checks(entry: catalogue.Entry, checks: dict[str, Any]) -> Iterator[str]:
    """The table of `check --json`, where the layer is in it."""
    row = next((row for row in checks.get("rows", ()) if row["layer"] == entry.name), None)
    if row is None:
        return
    yield _title("Check of the gradient", "-")
    yield (
        f":func:`~flax_customgrad.testing.check_vjp` on {row['examples']} "
        f"example{'s' * (row['examples'] != 1)}, {provenance(checks)}. An error is relative to "
        "the largest expected value; shown is the one that comes closest to what is allowed.\n"
    )
    yield _table(
        ("check", "compared", "error", "allowed"),
        [
            (
                c["check"].replace("_", " "),
                f"{c['compared']}, {c['skipped']} skipped" if c["skipped"] else f"{c['compared']}",
                *_error(c["error"], c["allowed"]),
            )
            for c in row["checks"]
        ],
    )
    yield f"To repeat it: ``python -m flax_customgrad check {entry.name}``.\n"


def _error(error: float | None, allowed: float | None) -> tuple[str, str]:
    return ("", "") if error is None else (f"{error:.1e}", f"{allowed:.0e}")


def _benchmark(entry: catalogue.Entry, benchmarks: dict[str, Any]) -> Iterator[str]:
    """The rows of `bench --json` that are of this layer."""
    rows = [row for row in benchmarks.get("rows", ()) if row["layer"] == entry.name]
    if not rows:
        return
    theirs = entry.stands_for or "autodiff"
    yield _title("Speed", "-")
    yield (
        f"Value and gradient, compiled, {provenance(benchmarks)}. *Times as fast* is the time "
        f"of ``{theirs}`` divided by ours, the median and the quartiles. The memory is what is "
        "allocated beside inputs and outputs.\n"
    )
    yield _table(
        ("workload", "our time", "times as fast", f"memory, {theirs}", "memory, ours"),
        [
            (
                escaped(row["workload"]),
                f"{row['milliseconds']:.3g} ms",
                f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
                *(pictures.size(row["temporary_bytes"][of] or 0) for of in ("baseline", "ours")),
            )
            for row in rows
        ],
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", "   :class: measurements", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def _raw(text: str) -> str:
    return f".. raw:: html\n\n{textwrap.indent(text, '   ')}\n"


def _operation(module: ModuleType, entry: catalogue.Entry) -> Iterator[str]:
    """The docstring of another file of the family, which holds an operation of the layer."""
    yield _title(f"The operation {module.__name__.rpartition('.')[2].replace('_', ' ')}", "~")
    yield from _typeset(module, entry)
    yield f"From {_file(module)}.\n"


def _typeset(module: ModuleType, entry: catalogue.Entry) -> Iterator[str]:
    """The docstring of a module: its formulas typeset, its text as it is."""
    names = {entry.name.rpartition(".")[2], getattr(entry.module, "__name__", entry.name)}
    siblings = {e.name.rpartition(".")[2] for e in catalogue.entries() if module_of(e) is module}
    docstring = inspect.getdoc(module) or ""
    for block in _blocks(docstring):
        if block.startswith(" "):
            yield _raw(mathematics.table(_rows_of(block, names, siblings), docstring))
        elif not block.startswith("Source: "):
            yield "\n".join(map(escaped, block.splitlines())) + "\n"


def _blocks(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring; formulas that a blank line parts stay together."""
    kind, block = False, []
    for paragraph in re.split(r"\n{2,}", docstring.strip("\n")):
        is_formulas = paragraph.startswith("    ")
        if block and not (kind and is_formulas):
            yield "\n\n".join(block)
            block = []
        kind = is_formulas
        block.append(paragraph)
    yield "\n\n".join(block)


def _rows_of(block: str, names: set[str], siblings: set[str]) -> str:
    """The lines of a block that concern a layer, where it has lines for each of several."""
    lines = [line for line in block.splitlines() if line.strip()]
    base = min(len(line) - len(line.lstrip()) for line in lines)
    labels = [re.match(rf" {{{base}}}(\w+)", line) for line in lines]
    if not any(label and label[1] in names for label in labels):
        return "\n".join(lines)
    kept, is_ours = [], True
    for line, label in zip(lines, labels, strict=True):
        if label is not None:
            is_ours = label[1] in names or label[1] not in siblings
        if is_ours:
            kept.append(line)
    return "\n".join(kept)
