"""Trains a network in few bits, beside the same in float32 and one whose gradient is zero.

Two hidden layers are quantized. In the control no gradient passes through them.
"""

import argparse
import time
from typing import Any

import numpy as np
from rich.console import Console

from flax_customgrad.command import training
from flax_customgrad.command.rows import Rows

_AHEAD = 5.0

_HEADING = ("recipe", "accuracy", "float32", "behind by", "allowed", "control")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `quantized` to a parser."""
    parser.add_argument(
        "recipes", nargs="*", metavar="NAME", help="a recipe by its name; all by default"
    )
    training.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints a row for each recipe.

    Returns:
        The exit status: 1 if a network is further behind float32 than its recipe allows, or less
        than 5 points ahead of its control; 2 if a package or a recipe is missing; else 0.
    """
    if missing := training.missing():
        return training.complain("quantized", missing)
    from flax_customgrad.command.digits import probe, recipes

    unknown = [name for name in args.recipes if name not in recipes.RECIPES]
    if unknown:
        there_are = ", ".join(map(repr, recipes.RECIPES))
        return training.complain(
            "quantized", f"no recipe {unknown[0]!r} to train with; there are {there_are}"
        )
    names = list(dict.fromkeys(args.recipes)) or list(recipes.RECIPES)
    console = Console(highlight=False)
    rows = Rows(console, _HEADING, names, args.markdown)
    failed, start = [], time.perf_counter()
    with console.status("training in float32"):
        float32 = probe.probe(recipes.FLOAT32.build, args.seeds, args.steps)
    for name in names:
        recipe = recipes.RECIPES[name]
        with console.status(f"training {name}"):
            found = probe.probe(recipe.build, args.seeds, args.steps, at_once=recipe.at_once)
        behind = 100 * float((float32.accuracy - found.accuracy).mean())
        fine = behind <= recipe.within and found.gain >= _AHEAD
        if not fine:
            failed.append(name)
        rows.add(name, _values(found, float32.accuracy, behind, recipe.within), fine=fine)
    if not args.markdown:
        console.print(training.summary(args, start))
    if failed:
        return training.complain(
            "quantized",
            "further behind float32 than allowed, or less than "
            f"{_AHEAD:.0f} points ahead of a zero gradient: {', '.join(failed)}",
            status=1,
        )
    return 0


def _values(found: Any, float32: np.ndarray, behind: float, within: float) -> tuple[str, ...]:
    return (
        f"{100 * found.accuracy.mean():.1f} ± {100 * found.accuracy.std():.1f} %",
        f"{100 * float32.mean():.1f} %",
        f"{behind:.1f} points",
        f"{within:.0f}",
        f"{100 * found.control.mean():.1f} %",
    )
