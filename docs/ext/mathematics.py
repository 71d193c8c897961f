"""The formulas of a docstring, typeset: from lines of text to a table of MathML.

A block of formulas in the docstring of a layer's file is written for a terminal, in columns:

    forward   x_hat = (x - mean) rstd,  rstd = 1 / sqrt(variance + epsilon)
    kept      x and the parameters

Its first column says what a line is, and what stands below each other stays so.
"""

import html
import re
from collections.abc import Iterable, Set

from formulas import formula, prose

_PROSE = {"kept", "source", "at a tie"}


def table(block: str, context: str = "") -> str:
    """A block of formulas as an HTML table.

    Args:
        block: its lines, indented alike.
        context: the text that it is from, which may define names that it uses.

    Returns:
        A `table` element, of class "mathematics".
    """
    lines = [line for line in block.splitlines() if line.strip()]
    going_on = {len(line) - len(line.lstrip()) for line in lines if line.lstrip()[0] == "="}
    rows = [_cells(line, going_on) for line in lines]
    names = set(re.findall(r"[A-Za-z]\w*", f"{context}\n{block}"))
    # `sum_g = ...` makes a name of what would be a sum over g.
    names |= {f"{name} =" for name in re.findall(r"(\w+) +=", f"{context}\n{block}")}
    base = min(offset for row in rows for offset, _ in row)
    edges = _edges((offset for row in rows for offset, _ in row), going_on)
    lines, label = ['<table class="mathematics">'], ""
    for row in rows:
        if row[0][0] == base:
            label = _label(row, base)
        lines.append(_row(row, edges, base, names, label in _PROSE))
    return "\n".join((*lines, "</table>"))


def _cells(line: str, going_on: Set[int]) -> list[tuple[int, str]]:
    """The texts of a line that stand apart by two spaces or more, and where each begins.

    Args:
        line: the line.
        going_on: where lines begin that go on from the one above with an equals sign. In a line
            with one in that place a cell begins there, so that the signs stand in a column.
    """
    # Spaces that only align an equals sign, or follow a comma, separate nothing.
    line = re.sub(r"(?<=\S)( +)(?==\s)", lambda m: " " + "\0" * (len(m[1]) - 1), line)
    line = re.sub(r"(?<=[,;])( +)", lambda m: " " + "\0" * (len(m[1]) - 1), line)
    cells = [(m.start(), m[0]) for m in re.finditer(r"\S(?:.*?)(?= {2,}|$)", line)]
    for at in going_on:
        for i, (start, text) in enumerate(cells):
            if start < at < start + len(text) and line[at] == "=":
                cells[i : i + 1] = [(start, text[: at - start]), (at, text[at - start :])]
    return [(start, text.replace("\0", "").strip()) for start, text in cells]


def _edges(offsets: Iterable[int], going_on: Set[int]) -> list[int]:
    """Where columns begin: two up to three characters apart are one, but for equals signs."""
    edges: list[int] = []
    for offset in sorted(set(offsets)):
        if not edges or offset > edges[-1] + 3 or offset in going_on:
            edges.append(offset)
    return edges


def _label(cells: list[tuple[int, str]], base: int) -> str:
    """What the first column says a line is; empty where it does not."""
    (offset, text), *others = cells
    is_label = offset == base and others and "=" not in text + others[0][1][:1]
    return text if is_label else ""


def _row(
    cells: list[tuple[int, str]], edges: list[int], base: int, names: Set[str], is_prose: bool
) -> str:
    """A line as a table row, each cell as wide as up to the next."""
    columns = [max(i for i, edge in enumerate(edges) if edge <= offset) for offset, _ in cells]
    row = [f"<td colspan={columns[0]}></td>"] if columns[0] else []
    label = _label(cells, base)
    for i, (_, text) in enumerate(cells):
        width = (*columns, len(edges))[i + 1] - columns[i]
        span = f" colspan={width}" if width > 1 else ""
        if label and i == 0:
            row.append(f'<th scope="row"{span}>{html.escape(text)}</th>')
        else:
            row.append(f"<td{span}>{prose(text) if is_prose else formula(text, names)}</td>")
    return f"<tr>{''.join(row)}</tr>"
