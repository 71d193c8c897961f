"""The table of whole models, of what `benchmarks.models --json` has saved."""

from collections.abc import Iterator
from typing import Any

from flax_customgrad.command.measurements import provenance

_QUANTITIES = ("step", "forward", "trace", "compile", "memory")


def markdown(measured: dict[str, Any]) -> Iterator[str]:
    """The lines of the table, and before them where and when it was measured.

    Args:
        measured: what the file holds.
    """
    yield f"Measured {provenance(measured)}:"
    yield ""
    yield f"| model | {' | '.join(_QUANTITIES)} |"
    yield f"|---|{'---|' * len(_QUANTITIES)}"
    rows = rows_of(measured)
    for model in dict.fromkeys(model for model, _ in rows):
        cells = (_cell(rows[model, quantity]) for quantity in _QUANTITIES)
        yield f"| {model} | {' | '.join(cells)} |"


def rows_of(measured: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows by model and quantity, of the models that are called inside of `functions`.

    Args:
        measured: what the file holds.
    """
    of_functions = (row for row in measured["rows"] if row["form"] == "functions")
    return {(row["model"], row["quantity"]): row for row in of_functions}


def _cell(row: dict[str, Any]) -> str:
    if row["unit"] == "MB":
        return f"{row['nnx']:.3g} → {row['ours']:.3g} MB"
    spread = f"{row['low']:.2f} to {row['high']:.2f}"
    time = f"{row['ours']:.3g} ms" if row["ours"] < 1000 else f"{row['ours'] / 1000:.2f} s"
    return f"**{row['ratio']:.2f}** ({spread}), {time}"
