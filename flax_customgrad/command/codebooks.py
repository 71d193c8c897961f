"""Trains autoencoders with a codebook, and shows how much of it each way of learning uses."""

import argparse
import time

from flax_customgrad.command import common
from flax_customgrad.command.row_printer import RowPrinter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `codebooks` to a parser."""
    common.add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints a row for each way to learn a codebook.

    Returns:
        The exit status: 2 if a package is missing, else 0.
    """
    if missing := common.missing_package("train"):
        return common.print_error("codebooks", missing)
    from rich.console import Console

    from flax_customgrad.command.digits import autoencoder

    console, start = Console(highlight=False), time.perf_counter()
    heading = ("gradient and learning", "error", "codes used", "perplexity")
    rows = RowPrinter(console, heading, list(autoencoder.CODEBOOKS), args.markdown)
    for name, arguments in autoencoder.CODEBOOKS.items():
        with console.status(f"training with {name}"):
            result = autoencoder.train(arguments, args.seeds, args.steps)
        rows.add(
            name,
            (
                f"{100 * result.error.mean():.1f} ± {100 * result.error.std():.1f} %",
                f"{100 * result.usage.mean():.1f} %",
                f"{result.perplexity.mean():.0f}",
            ),
        )
    if not args.markdown:
        console.print(f"{autoencoder.CODES} codes; the error is a share of the pixels' variance")
        console.print(common.training_summary(args, start))
    return 0
