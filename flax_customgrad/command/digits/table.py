"""The table at the end: both runs, how they compare, and which layers were converted."""

import statistics
from collections.abc import Iterator
from pathlib import Path

import rich.box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from flax_customgrad import catalogue
from flax_customgrad.command.digits.comparison import Comparison, Layer

_PREFIXES = {"flax": "nnx.", "flax_customgrad": "fcg."}


def make(found: Comparison, figure: Path) -> Table:
    """The table of a comparison, with a caption that says where its figure is."""
    table = Table(
        title=f"digits, {found.steps} steps, seed {found.seed}",
        caption=Text(f"figure: {figure}", overflow="fold"),
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    table.add_column("plain nnx", justify="right", overflow="fold")
    table.add_column("converted", justify="right", overflow="fold")
    table.add_column("compared")
    for row in _measures(found):
        table.add_row(*row)
    table.add_section()
    for layer in found.layers:
        table.add_row(layer.path, _name(layer.plain), _name(layer.converted), _fate(layer))
    return table


def _measures(found: Comparison) -> Iterator[tuple[str, ...]]:
    """What was measured: its name, both values, and how they compare."""
    plain, converted = found.plain, found.converted
    yield "final loss", f"{plain.losses[-1]:.5f}", f"{converted.losses[-1]:.5f}", ""
    accuracies = (f"{run.test_accuracy:.1%}" for run in (plain, converted))
    points = 100 * (converted.test_accuracy - plain.test_accuracy)
    yield "test accuracy", *accuracies, f"{points:+.1f} points"
    path, difference = found.worst_gradient
    yield "gradient, step 1", "", "", f"{difference:.1e} apart" if difference else "identical"
    if difference:
        yield "  worst parameter", "", "", path
    times = (f"{1000 * statistics.median(run.seconds):.2f} ms" for run in (plain, converted))
    lower, median, upper = found.speed
    yield "step time", *times, f"{median:.2f} times as fast"
    yield "  quartiles", "", "", f"{lower:.2f} to {upper:.2f}"
    kept = (decimal(run.residual_bytes, precision=2) for run in (plain, converted))
    ratio = converted.residual_bytes / plain.residual_bytes
    yield "kept for backward", *kept, f"{ratio:.2f} times as much"


def _name(cls: type) -> str:
    """A class as it is written: nnx.Linear, fcg.Linear, or the bare name of a user's own."""
    prefix = _PREFIXES.get(cls.__module__.partition(".")[0], "")
    return prefix + cls.__qualname__


def _fate(layer: Layer) -> Text:
    if layer.is_converted:
        return Text("converted", "green")
    has_drop_in = layer.plain in catalogue.drop_ins()
    return Text("left as it was" if has_drop_in else "no drop-in yet", "dim")
