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

_LIBRARIES = {"flax": "nnx", "flax_customgrad": "fcg"}


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
    accuracies = plain.test_accuracy, converted.test_accuracy
    points = 100 * (accuracies[1] - accuracies[0])
    yield "test accuracy", *(f"{a:.1%}" for a in accuracies), f"{points:+.1f} points"
    path, difference = found.worst_gradient
    yield "first gradient", "", "", f"{difference:.1e} apart" if difference else "identical"
    if difference:
        yield "  worst parameter", "", "", path
    times = (f"{1000 * statistics.median(run.seconds):.2f} ms" for run in (plain, converted))
    lower, median, upper = found.speed
    yield "step time", *times, f"{median:.2f} times as fast"
    yield "  quartiles", "", "", f"{lower:.2f} to {upper:.2f}"
    kept = plain.residual_bytes, converted.residual_bytes
    ratio = kept[1] / kept[0]
    yield (
        "kept for backward",
        *(decimal(n, precision=2) for n in kept),
        f"{ratio:.2f} times as much",
    )


def _name(cls: type) -> str:
    """A class under the short name of its library."""
    library = cls.__module__.partition(".")[0]
    return f"{_LIBRARIES.get(library, library)}.{cls.__qualname__}"


def _fate(layer: Layer) -> Text:
    if layer.is_converted:
        return Text("converted", "green")
    return Text(
        "left as it was" if layer.plain in catalogue.drop_ins() else "no drop-in yet", "dim"
    )
