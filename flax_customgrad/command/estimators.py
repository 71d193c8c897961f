"""Trains a network through each straight-through and surrogate gradient, beside one without.

Each network has two hidden blocks whose gradient passes through the estimator. Its control is the
same network with that gradient set to zero.
"""

import argparse
import time
from typing import Any

from rich.console import Console

from flax_customgrad.command import training
from flax_customgrad.command.rows import Rows

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
    training.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints a row for each estimator.

    Returns:
        The exit status: 1 if an estimator is less than 5 points ahead of its control, 2 if a
        package or an estimator is missing, else 0.
    """
    if missing := training.missing():
        return training.complain("estimators", missing)
    from flax_customgrad.command.digits import probe, trials

    unknown = [name for name in args.estimators if name not in trials.TRIALS]
    if unknown:
        there_are = ", ".join(trials.TRIALS)
        return training.complain(
            "estimators", f"no estimator {unknown[0]!r} to train with; there are {there_are}"
        )
    names = list(dict.fromkeys(args.estimators)) or list(trials.TRIALS)
    console = Console(highlight=False)
    rows = Rows(console, _HEADING, names, args.markdown)
    behind, start = [], time.perf_counter()
    for name in names:
        with console.status(f"training with {name}"):
            found = probe.probe(trials.TRIALS[name].build, args.seeds, args.steps)
        if found.gain < _AHEAD:
            behind.append(name)
        rows.add(name, _values(found), fine=found.gain >= _AHEAD)
    if not args.markdown:
        console.print(training.summary(args, start))
    if behind:
        return training.complain(
            "estimators",
            f"less than {_AHEAD:.0f} points ahead of a zero gradient: {', '.join(behind)}",
            status=1,
        )
    return 0


def _values(found: Any) -> tuple[str, ...]:
    accuracy, control = 100 * found.accuracy, 100 * found.control
    return (
        f"{accuracy.mean():.1f} ± {accuracy.std():.1f} %",
        f"{accuracy.min():.1f} %",
        f"{control.mean():.1f} %",
        f"{found.gain:.1f} points",
    )
