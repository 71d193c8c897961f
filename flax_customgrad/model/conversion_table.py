"""The table that a `Conversion` prints as: at most 100 columns, and totals below."""

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_customgrad.model.conversion import Conversion, ConversionRow

_WIDTH = 100
_HEADING = ("path", "in flax.nnx", "result")


def table(report: "Conversion") -> str:
    """The rows of a report, aligned and wrapped, and a sentence for each total.

    Args:
        report: the report.
    """
    rows = [_HEADING, *map(_cells, report.rows)]
    path, name = (min(max(len(row[k]) for row in rows), most) for k, most in ((0, 38), (1, 28)))
    lines = [
        f"{a:<{path}}  {b:<{name}}  {c}".rstrip()
        for row in rows
        for a, b, c in _wrapped(row, (path, name, _WIDTH - path - name - 4))
    ]
    return "\n".join([*lines, *textwrap.wrap(_totals(report), _WIDTH), *_kept(report)])


def _cells(row: "ConversionRow") -> tuple[str, str, str]:
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


def _totals(report: "Conversion") -> str:
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


def _kept(report: "Conversion") -> list[str]:
    if not report.kept_bytes:
        return []
    counts = {form: f"{nbytes:,}" for form, nbytes in report.kept_bytes.items()}
    form, count = max(map(len, counts)), max(map(len, counts.values()))
    lines = [f"  {name:<{form}}  {nbytes:>{count}}" for name, nbytes in counts.items()]
    return ["Kept for the backward, in bytes:", *lines]
