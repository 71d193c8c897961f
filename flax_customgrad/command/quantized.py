"""Trains quantized networks, each beside float32 and a control whose gradient is zero.

Two hidden layers are quantized. In the control no gradient passes through them.
"""

import argparse
import time
from typing import Any

import numpy as np

from flax_customgrad.command import common
from flax_customgrad.command.row_printer import RowPrinter

_LEAST_GAIN = 5.0
"""How many points a network must be ahead of its control."""

_HEADING = ("recipe", "accuracy", "float32", "behind by", "allowed", "control")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `quantized` to a parser."""
    parser.add_argument(
        "recipes", nargs="*", metavar="NAME", help="a recipe by its name; all by default"
    )
    common.add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints a row for each recipe.

    Returns:
        The exit status: 1 if a network is further behind float32 than its recipe allows, or less
        than 5 points ahead of its control; 2 if a package or a recipe is missing; else 0.
    """
    if missing := common.missing_package("train"):
        return common.print_error("quantized", missing)
    from rich.console import Console

    from flax_customgrad.command.digits import controlled, recipes

    unknown = [name for name in args.recipes if name not in recipes.RECIPES]
    if unknown:
        known = ", ".join(map(repr, recipes.RECIPES))
        return common.print_error(
            "quantized", f"no recipe {unknown[0]!r} to train with; there are {known}"
        )
    names = list(dict.fromkeys(args.recipes)) or list(recipes.RECIPES)
    console = Console(highlight=False)
    rows = RowPrinter(console, _HEADING, names, args.markdown)
    failed, start = [], time.perf_counter()
    with console.status("training in float32"):
        float32 = controlled.train_with_control(recipes.FLOAT32.build, args.seeds, args.steps)
    for name in names:
        recipe = recipes.RECIPES[name]
        with console.status(f"training {name}"):
            result = controlled.train_with_control(
                recipe.build, args.seeds, args.steps, vmap_seeds=recipe.vmap_seeds
            )
        behind = 100 * float((float32.accuracy - result.accuracy).mean())
        passed = behind <= recipe.tolerance and result.gain >= _LEAST_GAIN
        if not passed:
            failed.append(name)
        rows.add(name, _values(result, float32.accuracy, behind, recipe.tolerance), passed=passed)
    if not args.markdown:
        console.print(common.training_summary(args, start))
    if failed:
        return common.print_error(
            "quantized",
            "further behind float32 than allowed, or less than "
            f"{_LEAST_GAIN:.0f} points ahead of a zero gradient: {', '.join(failed)}",
            status=1,
        )
    return 0


def _values(result: Any, float32: np.ndarray, behind: float, tolerance: float) -> tuple[str, ...]:
    return (
        f"{100 * result.accuracy.mean():.1f} ± {100 * result.accuracy.std():.1f} %",
        f"{100 * float32.mean():.1f} %",
        f"{behind:.1f} points",
        f"{tolerance:.0f}",
        f"{100 * result.control.mean():.1f} %",
    )
