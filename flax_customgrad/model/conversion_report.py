"""`Conversion`: the report of a conversion, and the table that it prints as."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from flax_customgrad.model.tree import Paths

_WIDTH = 100
_HEADING = ("path", "in flax.nnx", "result")


@dataclass(frozen=True)
class ConversionRow:
    """What becomes of a layer, of a function that a layer holds, or of a call by name.

    Attributes:
        paths: every path of the layer or function. Of a call the name of the caller, and of an
            import that of the module and the name.
        kind: "layer"; "function", which a layer holds; "call" of a function by name; or "import"
            of a function by name, which nothing reaches.
        name: what it is in flax.nnx or jax.nn, `nnx.Linear`, or the name of a user's own.
        drop_in: what stands for it in this library, `fcg.Linear`; "" where nothing does.
        is_converted: whether it is that already.
        remark: why it stays, or what else is to be said.
    """

    paths: Paths
    kind: Literal["layer", "function", "call", "import"]
    name: str
    drop_in: str = ""
    is_converted: bool = False
    remark: str = ""


@dataclass(frozen=True)
class Conversion:
    """What `convert` has made of a model, or would make; it prints as a table.

    Attributes:
        rows: layers, held functions, calls and imports, in this order.
        kept_bytes: with example inputs, the bytes that the backward keeps beyond parameters and
            inputs: of the model "as it is", with "flax.nnx" alone, "converted", and "converted,
            inside fcg.functions()".
    """

    rows: tuple[ConversionRow, ...]
    kept_bytes: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """A table of at most 100 columns, and the totals."""
        return _table(self)


def _table(report: Conversion) -> str:
    """The rows of a report, aligned and wrapped, and a sentence for each total."""
    rows = [_HEADING, *map(_cells, report.rows)]
    path, name = (min(max(len(row[k]) for row in rows), most) for k, most in ((0, 38), (1, 28)))
    lines = [
        f"{a:<{path}}  {b:<{name}}  {c}".rstrip()
        for row in rows
        for a, b, c in _wrapped(row, (path, name, _WIDTH - path - name - 4))
    ]
    return "\n".join([*lines, *textwrap.wrap(_totals(report), _WIDTH), *_kept(report)])


def _cells(row: ConversionRow) -> tuple[str, str, str]:
    where = {"call": "in ", "import": ""}.get(row.kind, "")
    path = ", ".join(where + (path or "(the model)") for path in row.paths)
    if row.kind == "call":
        result = f"is {row.drop_in} inside fcg.functions()"
    elif row.drop_in:
        result = f"{'is' if row.is_converted else 'would become'} {row.drop_in}"
    else:
        return path, row.name, f"stays: {row.remark}"
    return path, row.name, f"{result}; {row.remark}" if row.remark else result


def _wrapped(row: tuple[str, ...], widths: tuple[int, ...]) -> Iterator[tuple[str, ...]]:
    """The lines of a row whose cells are wrapped."""
    cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
    for k in range(max(map(len, cells))):
        yield tuple(lines[k] if k < len(lines) else "" for lines in cells)


def _totals(report: Conversion) -> str:
    sentences = []
    for kind, name in {"layer": "Layers", "function": "Functions"}.items():
        rows = [row for row in report.rows if row.kind == kind]
        done = sum(row.is_converted for row in rows)
        left = sum(not row.drop_in for row in rows)
        counts = {"converted": done, "to convert": len(rows) - done - left}
        counts["stays" if left == 1 else "stay"] = left
        said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        sentences.append(f"{name}: {said}." if rows else f"{name}: none.")
    calls = sum(row.kind == "call" for row in report.rows)
    if report.kept_bytes:
        sentences.append(f"Called by name: {calls or 'none'}.")
    if not any(row.is_converted for row in report.rows):
        can = any(row.drop_in for row in report.rows if row.kind != "call")
        sentences.insert(0, "Nothing is converted" + ("." if can else ", and nothing would be."))
    return " ".join(sentences)


def _kept(report: Conversion) -> list[str]:
    if not report.kept_bytes:
        return []
    counts = {form: f"{nbytes:,}" for form, nbytes in report.kept_bytes.items()}
    form, count = max(map(len, counts)), max(map(len, counts.values()))
    lines = [f"  {name:<{form}}  {nbytes:>{count}}" for name, nbytes in counts.items()]
    return ["Kept for the backward, in bytes:", *lines]
