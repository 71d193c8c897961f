"""The final table: both runs, how they compare, and which layers were converted."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flax_customgrad import catalogue
from flax_customgrad.command.side_by_side.comparison import LayerPair, RunComparison

if TYPE_CHECKING:
    from rich.table import Table

_PREFIXES = {"flax": "nnx.", "flax_customgrad": "fcg."}


def make(result: RunComparison, figure: Path) -> "Table":
    """The table of a comparison, with a caption that says where its figure is."""
    import rich.box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{result.task.name}, {result.steps} steps, seed {result.seed}",
        caption=Text(f"figure: {figure}", overflow="fold"),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    table.add_column("plain nnx", justify="right", overflow="fold")
    table.add_column("converted", justify="right", overflow="fold")
    table.add_column("compared")
    for row in _measures(result):
        table.add_row(*row)
    table.add_section()
    for layer in result.layers:
        fate, style = _fate(layer)
        names = _name(layer.plain), _name(layer.converted)
        table.add_row(layer.path, *names, Text(fate, style))
    return table


def _measures(result: RunComparison) -> Iterator[tuple[str, ...]]:
    """The measurements: the name of each, both values, and how they compare."""
    from rich.filesize import decimal

    plain, converted = result.plain, result.converted
    yield "final loss", f"{plain.losses[-1]:.5f}", f"{converted.losses[-1]:.5f}", ""
    accuracies = (f"{run.test_accuracy:.1%}" for run in (plain, converted))
    points = 100 * (converted.test_accuracy - plain.test_accuracy)
    yield "test accuracy", *accuracies, f"{points:+.1f} points"
    path, difference = result.worst_gradient
    yield "gradient, step 1", "", "", f"{difference:.1e} apart" if difference else "identical"
    if difference:
        yield "  worst parameter", "", "", path
    times = (f"{1000 * statistics.median(run.seconds):.4g} ms" for run in (plain, converted))
    lower, ratio, upper = result.speed
    yield "step time", *times, f"{ratio:.2f} times as fast"
    yield "  quartiles of pairs", "", "", f"{lower:.2f} to {upper:.2f}"
    kept = (decimal(run.residual_bytes, precision=2) for run in (plain, converted))
    ratio = converted.residual_bytes / plain.residual_bytes
    yield "kept for backward", *kept, f"{ratio:.2f} times as much"


def _name(cls: type) -> str:
    """A class as it is written: nnx.Linear, fcg.Linear, or the bare name of a user's own."""
    prefix = _PREFIXES.get(cls.__module__.partition(".")[0], "")
    return prefix + cls.__qualname__


def _fate(layer: LayerPair) -> tuple[str, str]:
    """What the conversion did to a layer, and the style to print it in."""
    if layer.is_converted:
        return "converted", "green"
    return "left as it was" if layer.plain in catalogue.drop_ins() else "no drop-in yet", "dim"
