"""Trains a network on digits or on text, plain and converted, and compares the two."""

import argparse
import importlib

from flax_customgrad.command import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `train` to a parser."""
    parser.add_argument(
        "--task",
        choices=("digits", "text"),
        default="digits",
        help="a convolutional network on images, or a decoder on the source of Python's standard "
        "library, byte by byte (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=common.positive_integer,
        default=400,
        help="training steps (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="seed of the split, the parameters and the batches (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=common.picture(".png"),
        default="customgrad_train.png",
        metavar="FILE.png",
        help="where to save the figure (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="print only the final table")


def run(args: argparse.Namespace) -> int:
    """Trains, prints the table and saves the figure.

    Returns:
        The exit status: 1 if the two runs disagree, 2 if a package is missing, else 0.
    """
    if missing := common.missing_package("train"):
        return common.print_error("train", missing)
    from rich.console import Console

    from flax_customgrad.command.side_by_side import comparison, figure, progress, table

    task = importlib.import_module(f"flax_customgrad.command.{args.task}.{args.task}_task").TASK

    console = Console(highlight=False)
    show = progress.silent() if args.quiet else progress.on_console(console, args.steps)
    result = comparison.compare(task, args.steps, args.seed, show)
    figure.save(result, args.out)
    console.print(table.make(result, args.out))
    disagreements = result.disagreements()
    if disagreements:
        reason = f"the runs disagree: {'; '.join(disagreements)}"
        return common.print_error("train", reason, status=1)
    return 0


def _seed(text: str) -> int:
    seed = common.integer(text)
    # The largest that NumPy, JAX and scikit-learn all take.
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"a seed is from 0 to {2**32 - 1}, got {seed}")
    return seed
