"""Trains a network through each straight-through and surrogate gradient, beside a control.

Each network has two hidden blocks whose gradient passes through the estimator. Its control is the
same network with that gradient set to zero.
"""

import argparse
import time
from typing import Any

from flax_customgrad.command import common
from flax_customgrad.command.row_printer import RowPrinter

_LEAST_GAIN = 5.0
"""How many points an estimator must be ahead of its control."""

_HEADING = ("estimator", "accuracy", "worst seed", "control", "ahead by")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `estimators` to a parser."""
    parser.add_argument(
        "estimators",
        nargs="*",
        metavar="NAME",
        help="an estimator, by its name in the catalogue; all by default",
    )
    common.add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints a row for each estimator.

    Returns:
        The exit status: 1 if an estimator is less than 5 points ahead of its control, 2 if a
        package or an estimator is missing, else 0.
    """
    if missing := common.missing_package("train"):
        return common.print_error("estimators", missing)
    from rich.console import Console

    from flax_customgrad.command.digits import controlled, trials

    unknown = [name for name in args.estimators if name not in trials.TRIALS]
    if unknown:
        known = ", ".join(trials.TRIALS)
        return common.print_error(
            "estimators", f"no estimator {unknown[0]!r} to train with; there are {known}"
        )
    names = list(dict.fromkeys(args.estimators)) or list(trials.TRIALS)
    console = Console(highlight=False)
    rows = RowPrinter(console, _HEADING, names, args.markdown)
    behind, start = [], time.perf_counter()
    for name in names:
        with console.status(f"training with {name}"):
            result = controlled.train_with_control(
                trials.TRIALS[name].build, args.seeds, args.steps
            )
        if result.gain < _LEAST_GAIN:
            behind.append(name)
        rows.add(name, _values(result), passed=result.gain >= _LEAST_GAIN)
    if not args.markdown:
        console.print(common.training_summary(args, start))
    if behind:
        return common.print_error(
            "estimators",
            f"less than {_LEAST_GAIN:.0f} points ahead of a zero gradient: {', '.join(behind)}",
            status=1,
        )
    return 0


def _values(result: Any) -> tuple[str, ...]:
    accuracy, control = 100 * result.accuracy, 100 * result.control
    return (
        f"{accuracy.mean():.1f} ± {accuracy.std():.1f} %",
        f"{accuracy.min():.1f} %",
        f"{control.mean():.1f} %",
        f"{result.gain:.1f} points",
    )
