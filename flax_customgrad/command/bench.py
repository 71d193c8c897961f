"""Times layers against those of flax.nnx, and compares what their backwards keep.

Value and gradient, compiled, on the workloads of the catalogue; a layer that flax.nnx has not,
against autodiff of the same layer. Both run in turn in one process, so that whatever else the
machine does slows both alike.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from flax_customgrad import catalogue
from flax_customgrad.command import common, measurements
from flax_customgrad.command.benchmark.paired import pin_allocator
from flax_customgrad.command.benchmark.workloads import SLOWER, Measurement, measure
from flax_customgrad.model.audit_report import nbytes_text

if TYPE_CHECKING:
    from rich.table import Table

_COMPILING = 5.0
"""About how many seconds a workload takes beside its timing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `bench` to a parser."""
    parser.add_argument(
        "layers",
        nargs="*",
        type=common.layer_name,
        metavar="LAYER",
        help="a layer to time; all by default",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=3.0,
        help="how long to time each workload (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=common.writable, metavar="FILE", help="where to save the measurements"
    )
    parser.add_argument(
        "--out",
        type=common.picture(".svg", ".png"),
        metavar="FILE",
        help="where to save a chart, FILE.svg or FILE.png",
    )


def run(args: argparse.Namespace) -> int:
    """Times the workloads, and prints a table in which those that lose come first.

    Returns:
        The exit status: 2 if the chart needs a package that is missing, 130 if it was interrupted,
        else 0.
    """
    from rich.console import Console

    if args.out is not None and (missing := common.missing_package("plot")):
        return common.print_error("bench", missing)
    if sys.argv[1:2] == ["bench"]:
        pin_allocator("flax_customgrad")
    console = Console(highlight=False)
    names = dict.fromkeys(args.layers)
    entries = [catalogue.find(name) for name in names] or catalogue.entries()
    workloads = [(entry, workload) for entry in entries for workload in entry.workloads]
    n, start = len(workloads), time.perf_counter()
    expected = common.duration(n * (args.seconds + _COMPILING))
    console.print(
        f"{_count(n, 'workload')} of {_count(len(entries), 'layer')}, about {expected}; "
        "--seconds and names make it shorter",
        style="dim",
    )
    done: list[Measurement] = []
    interrupted = False
    try:
        for entry, workload in workloads:
            left = common.time_left(time.perf_counter() - start, len(done), n)
            label = f"timing {len(done) + 1} of {n}{left}: {entry.name}, {workload}"
            with console.status(label):
                done.append(measure(entry, workload, args.seconds))
    except KeyboardInterrupt:
        interrupted = True
    done.sort(key=lambda measured: measured.ratio)
    if done:
        console.print(_table(done))
        if any(measured.baseline != "nnx" for measured in done):
            console.print("* against autodiff of the same layer: flax.nnx has none", style="dim")
        _save(args, done)
    how = f"interrupted; {len(done)} of {n}" if interrupted else f"{n}"
    console.print(f"{how} workloads, {_losses(done)}; {_where()}", soft_wrap=True)
    return common.INTERRUPTED if interrupted else 0


def _save(args: argparse.Namespace, done: Sequence[Measurement]) -> None:
    if args.json is not None:
        measurements.write(args.json, map(dataclasses.asdict, done))
    if args.out is not None:
        from flax_customgrad.command.benchmark import chart

        chart.save(done, args.out)


def _table(done: Sequence[Measurement]) -> "Table":
    import rich.box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("layer: workload")
    for title in ("our time", "times as fast", "nnx keeps", "ours keeps"):
        table.add_column(title, justify="right", no_wrap=True)
    for measured in done:
        speed = f"{measured.ratio:.2f}  {measured.low:.2f}-{measured.high:.2f}"
        kept = measured.kept_bytes
        table.add_row(
            f"{measured.layer}: {measured.workload}" + ("" if measured.baseline == "nnx" else " *"),
            f"{measured.milliseconds:.3g} ms",
            Text(speed, "red" if measured.ratio < SLOWER else ""),
            *(nbytes_text(nbytes or 0) for nbytes in (kept.baseline, kept.ours)),
        )
    return table


def _losses(done: Sequence[Measurement]) -> str:
    slower = sum(measured.ratio < SLOWER for measured in done)
    return f"{slower or 'none'} below {SLOWER} times as fast"


def _where() -> str:
    device = jax.devices()[0].device_kind
    return f"jax {jax.__version__}, {device}, {_count(os.cpu_count() or 1, 'core')}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return seconds
