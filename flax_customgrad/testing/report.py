"""The report of a check: its rows, the table that is printed, and the error that is raised."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from flax_customgrad.testing.coverage import Hint

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        check: name of the check, such as "vmap".
        case: which variant of it, such as "parameters shared".
        argument: which argument's gradient, such as "m.kernel"; empty where it concerns all.
        error: largest difference, relative to the largest expected value; None if not compared.
        tolerance: the error allowed.
        status: "ok", "failed", or "skipped".
        note: why it was skipped, or what was raised or is not finite.
        details: of an exception, the user's lines that it came from, its text and its notes.
    """

    check: str
    case: str
    argument: str = ""
    error: float | None = None
    tolerance: float | None = None
    status: Literal["ok", "failed", "skipped"] = "ok"
    note: str = ""
    details: str = ""

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.check, self.case, self.argument) if part)
        if self.error is None:
            return f"{place}: {self.note or self.status}"
        return f"{place}: off by {self.error:.1e}, {self.tolerance:.0e} allowed"


class GradientError(AssertionError):
    """A gradient differs from its expected value.

    Attributes:
        report: the `Report` with every row.
    """

    def __init__(self, report: "Report"):
        self.report = report
        n = len(report.failures)
        title = f"the gradient of {report.name} failed {n} comparison{'s' * (n != 1)}:"
        lines = [title, *map(str, report.failures)]
        for details in _once(row.details for row in report.failures):
            lines += ["", *details.splitlines()]
        super().__init__("\n  ".join(lines))


@dataclass
class Report:
    """Every comparison made on one function or layer; prints as a table.

    Attributes:
        name: the function or layer.
        rows: the comparisons, in order.
        residual_bytes: bytes that the backward keeps, arguments excluded; None if not measured.
        reference_residual_bytes: the same for autodiff of the reference.
        not_covered: what the example cannot show, such as "bias is None".
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    residual_bytes: int | None = None
    reference_residual_bytes: int | None = None
    not_covered: list[Hint] = field(default_factory=list)

    @property
    def failures(self) -> list[Row]:
        """The rows that failed."""
        return [row for row in self.rows if row.status == "failed"]

    @property
    def warnings(self) -> list[str]:
        """What is no failure and yet worth a look, such as keeping more than autodiff does."""
        kept, by_autodiff = self.residual_bytes, self.reference_residual_bytes
        if kept is None or by_autodiff is None or kept <= by_autodiff:
            return []
        return [f"the backward keeps {kept} B, more than autodiff, which keeps {by_autodiff} B"]

    def __rich__(self) -> "Group":
        """A table with one line per check and case, for its worst argument; then what to say."""
        # Imported here, so that a gradient can be checked where rich is not installed.
        import rich.box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"gradient of {self.name}", box=rich.box.SIMPLE_HEAD)
        for column in ("check", "case", "worst argument", "error", "allowed", ""):
            numeric = column in ("error", "allowed")
            table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
        style = {"ok": "green", "failed": "bold red", "skipped": "yellow"}
        worst = self._worst()
        for row in worst:
            error = "" if row.error is None else f"{row.error:.1e}"
            allowed = "" if row.tolerance is None else f"{row.tolerance:.0e}"
            status = f"[{style[row.status]}]{row.status}[/]"
            table.add_row(row.check, row.case, row.argument, error, allowed, status)
        notes = [Text(f"{row.status}: {row}", style[row.status]) for row in worst if row.note]
        notes += [Text(details) for details in _once(row.details for row in worst)]
        notes += [Text(f"warning: {warning}", "yellow") for warning in self.warnings]
        if self.not_covered:
            notes.append(Text(f"not covered: {'; '.join(map(str, self.not_covered))}"))
        return Group(table, *notes)

    def __str__(self) -> str:
        from rich.console import Console

        # In a notebook rich would display the table rather than write it.
        text = io.StringIO()
        Console(file=text, width=100, force_jupyter=False).print(self)
        return text.getvalue()

    def _worst(self) -> list[Row]:
        def badness(row: Row) -> tuple[bool, float]:
            share = (row.error or 0.0) / row.tolerance if row.tolerance else 0.0
            return row.status == "failed", share

        worst: dict[tuple[str, str], Row] = {}
        for row in self.rows:
            key = (row.check, row.case)
            if key not in worst or badness(row) > badness(worst[key]):
                worst[key] = row
        return list(worst.values())


def _once(texts: Iterable[str]) -> list[str]:
    """The texts that are not empty, each once."""
    return [text for text in dict.fromkeys(texts) if text]
