"""Trains a network through each straight-through and surrogate gradient, beside one without.

Each network has two hidden blocks whose gradient passes through the estimator. Its control is the
same network with that gradient set to zero.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from flax_customgrad.command import extras

_AHEAD = 5.0

_HEADING = ("estimator", "accuracy", "worst seed", "control", "ahead by")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `estimators` to a parser."""
    parser.add_argument(
        "estimators",
        nargs="*",
        metavar="NAME",
        help="an estimator, by its name in the catalogue; all by default",
    )
    parser.add_argument(
        "--steps",
        type=extras.at_least(1),
        default=1500,
        help="training steps (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=extras.at_least(1), default=3, help="how many seeds (default: %(default)s)"
    )
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")


def run(args: argparse.Namespace) -> int:
    """Trains, and prints a line for each estimator.

    Returns:
        The exit status: 1 if an estimator is less than 5 points ahead of its control, 2 if a
        package or an estimator is missing, else 0.
    """
    if missing := extras.missing():
        return extras.complain("estimators", missing)
    from flax_customgrad.command.digits import trials
    from flax_customgrad.command.digits.probe import probe

    unknown = [name for name in args.estimators if name not in trials.TRIALS]
    if unknown:
        there_are = ", ".join(trials.TRIALS)
        return extras.complain(
            "estimators", f"no estimator {unknown[0]!r} to train with; there are {there_are}"
        )
    names = list(dict.fromkeys(args.estimators)) or list(trials.TRIALS)
    console = Console(highlight=False)
    say = _in_markdown(console) if args.markdown else _in_columns(console, names)
    say(_HEADING, True)
    behind, start = [], time.perf_counter()
    for name in names:
        with console.status(f"training with {name}"):
            found = probe(*trials.TRIALS[name], args.seeds, args.steps)
        if found.gain < _AHEAD:
            behind.append(name)
        say(_row(name, found), found.gain >= _AHEAD)
    if not args.markdown:
        console.print(
            f"digits, seeds: {args.seeds}, steps: {args.steps}, in "
            f"{time.perf_counter() - start:.0f} s"
        )
    if behind:
        return extras.complain(
            "estimators",
            f"less than {_AHEAD:.0f} points ahead of a zero gradient: {', '.join(behind)}",
            status=1,
        )
    return 0


def _row(name: str, found: Any) -> tuple[str, ...]:
    accuracy, control = 100 * found.accuracy, 100 * found.control
    spread = statistics.pstdev(map(float, accuracy))
    return (
        name,
        f"{accuracy.mean():.1f} ± {spread:.1f} %",
        f"{accuracy.min():.1f} %",
        f"{control.mean():.1f} %",
        f"{found.gain:.1f} points",
    )


Say = Callable[[tuple[str, ...], bool], None]
"""Prints a row, and whether it is as it should be; the first one is the heading."""


def _in_columns(console: Console, names: list[str]) -> Say:
    width = max(map(len, (*names, _HEADING[0])))

    def say(row: tuple[str, ...], fine: bool) -> None:
        style = "dim" if row is _HEADING else "" if fine else "red"
        name, *values = row
        console.print(
            Text(f"{name:{width}}" + "".join(f"{v:>14}" for v in values), style), soft_wrap=True
        )

    return say


def _in_markdown(console: Console) -> Say:
    def say(row: tuple[str, ...], fine: bool) -> None:
        name = row[0] if row is _HEADING else f"`{row[0]}`"
        console.print(f"| {' | '.join((name, *row[1:]))} |", soft_wrap=True, markup=False)
        if row is _HEADING:
            console.print("| --- |" + " ---: |" * len(row[1:]))

    return say
