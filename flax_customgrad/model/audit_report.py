"""`Audit`: the report of an audit, the table that it prints as, and Markdown."""

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

AS_IT_IS, NNX, OURS = "as it is", "flax.nnx", "ours"

_HEADING = ("path", "layer", "nnx", "ours", "made ours by")
_NARROWEST_PATH = 16
_OURS_IS = "after fcg.convert, and inside fcg.functions()"
_WHAT_IS_COUNTED = (
    "Kept between the forward and the backward pass, beside parameters and inputs. An array that "
    "several layers read counts once."
)
_WHY_COMPILED_DIFFERS = (
    "XLA computes some arrays again rather than keep them, and needs others within the passes, so "
    "this can be less or more than the total."
)


@dataclass(frozen=True)
class AuditRow:
    """What the backward keeps for a layer, for a function, or outside of all layers.

    Attributes:
        path: every path of the layer or of a function that a layer holds, separated by commas; of a
            call by name that of the Module that it is in.
        kind: "layer"; "function", which a layer holds; "call" of a function by name; "remat", for
            what `nnx.remat` keeps; or "outside" of all layers.
        name: what it is, `nnx.Linear` or `fcg.Linear`, or the name of a user's own.
        drop_in: what stands for it in this library; "" where nothing does.
        is_ours: whether it is of this library.
        remark: why it stays, or what else is to be said.
        kept: the bytes "as it is", with "flax.nnx", and with "ours". Empty where they are counted
            with another row, or where it was not called.
    """

    path: str
    kind: Literal["layer", "function", "call", "import", "remat", "outside"]
    name: str
    drop_in: str
    is_ours: bool
    remark: str
    kept: Mapping[str, int]


@dataclass(frozen=True)
class Audit:
    """What the backward of a model keeps, layer by layer; it prints as a table.

    Attributes:
        name: the class of the model.
        rows: the layers and functions in call order, then those that were not called, then what
            `nnx.remat` keeps and what is kept outside of layers.
        imports: functions that were imported by name, which neither `convert` nor `functions`
            reaches, with what to write instead.
        temporary_bytes: the temporary memory of the compiled value and gradient, with "flax.nnx"
            and with "ours"; empty unless `compiled=True`.
    """

    name: str
    rows: tuple[AuditRow, ...]
    imports: tuple[str, ...] = ()
    temporary_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, int]:
        """The bytes of all rows: "as it is", with "flax.nnx", and with "ours"."""
        return {
            form: sum(row.kept.get(form, 0) for row in self.rows) for form in (AS_IT_IS, NNX, OURS)
        }

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator[Any]:
        """The table, its totals, and what they mean."""
        from rich.text import Text

        yield _table(self, options.max_width)
        yield ""
        yield from (Text(line) for line in _sentences(self))

    def __str__(self) -> str:
        from rich.console import Console

        # In a notebook rich would display the table rather than write it.
        text = io.StringIO()
        Console(file=text, width=100, force_jupyter=False).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def to_markdown(self) -> str:
        """The table in Markdown, and its totals below it."""
        rows = [_HEADING, *map(_cells, grouped(self.rows)), _total(self)]
        heading, *body = (f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in rows)
        rule = "| --- | --- | ---: | ---: | --- |"
        return "\n".join([heading, rule, *body, "", *_sentences(self)])

    def to_svg(self) -> str:
        """The bars of the layers that keep most, as an SVG picture.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from flax_customgrad.model.audit_figure import svg

        return svg(self)

    def save(self, path: str | Path) -> None:
        """Saves the same picture in a file.

        Args:
            path: the file, whose name ends in `.svg` or `.png`.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the name ends otherwise.
        """
        from flax_customgrad.model.audit_figure import save

        save(self, Path(path))


def nbytes_text(nbytes: int) -> str:
    """A number of bytes in three digits.

    Args:
        nbytes: the number.
    """
    size, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        # What rounds to 1000 is one of the next unit.
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    digits = 0 if unit == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {unit}" if nbytes else "0"


def grouped(rows: Sequence[AuditRow]) -> list[AuditRow]:
    """One row for the layers of equal blocks: `blocks/0-11/norm` for twelve, with all their bytes.

    Args:
        rows: the rows of the layers.
    """
    groups: dict[Any, list[AuditRow]] = {}
    for row in rows:
        names = row.path.split("/")
        # The layers of a Sequential are told apart by the last number; a call is in a block.
        n = len(names) - (row.kind not in ("call", "remat"))
        pattern = ["*" if name.isdigit() and k < n else name for k, name in enumerate(names)]
        facts = dataclasses.replace(row, path="/".join(pattern), kept={})
        groups.setdefault((str(facts), bool(row.kept)), []).append(row)
    return [_sum_of(group) for group in groups.values()]


def _sum_of(group: Sequence[AuditRow]) -> AuditRow:
    names = zip(*(row.path.split("/") for row in group), strict=True)
    path = "/".join(map(_range, names))
    kept = {form: sum(row.kept[form] for row in group) for form in group[0].kept}
    return dataclasses.replace(group[0], path=path, kept=kept)


def _range(names: Sequence[str]) -> str:
    """The same name in several paths: itself, or the range of numbers that it has."""
    if len(set(names)) == 1:
        return names[0]
    numbers = sorted(set(map(int, names)))
    is_range = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if is_range else ",".join(map(str, numbers))


def _table(report: Audit, width: int) -> "Table":
    import rich.box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"kept for the backward of {report.name}",
        box=rich.box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
        show_footer=True,
    )
    rows = [(row, _cells(row)) for row in grouped(report.rows)]
    paths, *others, _ = (
        max(map(len, column))
        for column in zip(_HEADING, _total(report), *(cells for _, cells in rows), strict=True)
    )
    # What the others leave, beside two columns between each and room for a name in the last.
    room = width - sum(others) - 2 * len(others) - 2 - len("fcg.functions()")
    for title, footer in zip(_HEADING, _total(report), strict=True):
        table.add_column(
            title,
            footer=footer,
            justify="right" if title in ("nnx", "ours") else "left",
            overflow="fold",
            width=min(paths, max(_NARROWEST_PATH, room)) if title == "path" else None,
            no_wrap=title in ("nnx", "ours", "layer"),
        )
    for row, (*cells, result) in rows:
        style = "green" if row.is_ours else "" if row.drop_in else "dim"
        table.add_row(*cells, Text(result, style))
    return table


def _cells(row: AuditRow) -> tuple[str, ...]:
    sizes = (nbytes_text(row.kept[form]) if row.kept else "" for form in (NNX, OURS))
    if row.kind in ("remat", "outside"):
        result = ""
    elif row.is_ours:
        result = "is ours"
    elif row.drop_in:
        result = "fcg.functions()" if row.kind == "call" else "fcg.convert"
    else:
        result = "stays"
    between = ": " if result == "stays" else "; "
    return row.path, row.name, *sizes, between.join(filter(None, (result, row.remark)))


def _total(report: Audit) -> tuple[str, ...]:
    kept = report.kept
    ratio = f"ours is {kept[OURS] / kept[NNX]:.0%}" if kept[NNX] else ""
    return "total", "", nbytes_text(kept[NNX]), nbytes_text(kept[OURS]), ratio


def _sentences(report: Audit) -> list[str]:
    kept, lines = report.kept, [_WHAT_IS_COUNTED]
    now, then = nbytes_text(kept[AS_IT_IS]), nbytes_text(kept[OURS])
    if kept[AS_IT_IS] > kept[OURS]:
        lines.append(f"As it is, the model keeps {now}; {_OURS_IS}, {then}.")
    else:
        lines.append(f"As it is, the model keeps {now}; {_OURS_IS}, no less.")
    lines += report.imports
    if report.temporary_bytes:
        theirs, ours = (nbytes_text(report.temporary_bytes[form]) for form in (NNX, OURS))
        lines.append(
            f"Compiled, the value and gradient take {theirs} of temporary memory with flax.nnx and "
            f"{ours} with ours. {_WHY_COMPILED_DIFFERS}"
        )
    return lines


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "\\<")
