"""Checks the gradient of every layer, or of those named.

Each example of a catalogue entry goes through `check_vjp`, and gets a line as soon as it is done.
"""

import argparse
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from flax_customgrad import catalogue
from flax_customgrad.command import measurements
from flax_customgrad.command.common import INTERRUPTED, layer_name, time_left, writable
from flax_customgrad.testing import CHECKS, Report, Row, check_vjp

if TYPE_CHECKING:
    from rich.text import Text

_DEVICES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `check` to a parser."""
    parser.add_argument(
        "layers",
        nargs="*",
        type=layer_name,
        metavar="NAME",
        help="a layer to check; all by default",
    )
    parser.add_argument(
        "--only",
        type=_checks,
        default=CHECKS,
        metavar="CHECKS",
        help=f"the checks to run, separated by commas: {', '.join(CHECKS)}",
    )
    parser.add_argument("--details", action="store_true", help="print the table of each example")
    parser.add_argument(
        "--json",
        type=writable,
        metavar="FILE",
        help="write a summary of each layer, if no check fails; the documentation shows it",
    )


def run(args: argparse.Namespace) -> int:
    """Checks the examples and prints a line for each.

    Returns:
        The exit status: 1 if any comparison failed, 130 if it was interrupted, else 0.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    _ask_for_devices()
    console = Console(highlight=False)
    named = [catalogue.find(name) for name in dict.fromkeys(args.layers)]
    entries = named or catalogue.entries()
    examples = {
        f"{entry.name}: {name}": (entry, make(entry.module))
        for entry in entries
        for name, make in entry.examples.items()
    }
    heading = f"{'':7}compared  skipped  error/allowed    time  example"
    console.print(heading, style="dim", soft_wrap=True)
    reports: list[Report] = []
    by_layer: dict[str, list[Report]] = {}
    start = time.perf_counter()
    for label, (entry, example) in examples.items():
        began = time.perf_counter()
        left = time_left(began - start, len(reports), len(examples))
        try:
            with console.status(f"checking {len(reports) + 1} of {len(examples)}{left}: {label}"):
                expected = catalogue.expected(entry, example)
                report = check_vjp(*example, **expected, checks=args.only, raises=False)
        except KeyboardInterrupt:
            console.print(f"interrupted; {_summary(reports, len(examples), start)}")
            return INTERRUPTED
        report.name = label
        reports.append(report)
        by_layer.setdefault(entry.name, []).append(report)
        console.print(_line(report, time.perf_counter() - began), soft_wrap=True)
        for row in report.rows:
            if row.status != "ok":
                console.print(Padding(Text(f"{row.status}: {row}"), (0, 0, 0, 7), expand=False))
        if args.details:
            console.print(report)
    console.print(_summary(reports, len(examples), start))
    failed = any(report.failures for report in reports)
    if args.json is not None and failed:
        console.print(f"{args.json} is not written: it is a record of what passes", soft_wrap=True)
    elif args.json is not None:
        measurements.write(args.json, [_record(*layer) for layer in by_layer.items()])
    return 1 if failed else 0


def _record(layer: str, reports: Sequence[Report]) -> dict[str, Any]:
    """What is kept of the reports on a layer: for each check how many comparisons, and the worst.

    The worst error is that which comes closest to the error allowed for it.
    """
    rows = [row for report in reports for row in report.rows]
    checks = []
    for check in CHECKS:
        compared = [row for row in rows if row.check == check and row.error is not None]
        skipped = sum(row.check == check and row.status == "skipped" for row in rows)
        if compared or skipped:
            worst = max(compared, key=_share, default=None)
            checks.append(
                {
                    "check": check,
                    "compared": len(compared),
                    "skipped": skipped,
                    "error": worst and float(f"{worst.error:.1e}"),
                    "allowed": worst and worst.tolerance,
                }
            )
    return {"layer": layer, "examples": len(reports), "checks": checks}


def _share(row: Row) -> float:
    """How much of the error allowed a comparison used up."""
    return (row.error or 0.0) / row.tolerance if row.tolerance else 0.0


def _summary(reports: Sequence[Report], n: int, start: float) -> str:
    """The line below all others; n is how many examples there are."""
    done = f"{len(reports)} of {n}" if len(reports) < n else f"{n}"
    failed = sum(len(report.failures) for report in reports)
    return (
        f"{done} examples: {sum(map(_compared, reports))} comparisons, {failed} failed, "
        f"{sum(map(_skipped, reports))} skipped, in {time.perf_counter() - start:.0f} s"
    )


def _line(report: Report, seconds: float) -> "Text":
    """The summary of one example, below the heading that `run` prints."""
    from rich.text import Text

    shares = [_share(row) for row in report.rows if row.error is not None and row.tolerance]
    worst = f"{max(shares):.1e}" if shares else ""
    return Text.assemble(
        ("failed ", "bold red") if report.failures else ("ok     ", "green"),
        f"{_compared(report):8}  {_skipped(report):7}  {worst:>13}  {seconds:4.1f} s",
        f"  {report.name}",
    )


def _compared(report: Report) -> int:
    return sum(row.error is not None or row.status == "failed" for row in report.rows)


def _skipped(report: Report) -> int:
    return sum(row.status == "skipped" for row in report.rows)


def _ask_for_devices() -> None:
    """Asks for 8 CPU devices, which a mesh needs; too late once JAX has a backend."""
    flag = "--xla_force_host_platform_device_count"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={_DEVICES}".strip()
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")


def _checks(names: str) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in CHECKS:
            raise argparse.ArgumentTypeError(f"no check {name!r}; there are {', '.join(CHECKS)}")
    return chosen
