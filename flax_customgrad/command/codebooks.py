"""Trains autoencoders with a codebook in the middle, and shows how much of it each way uses."""

import argparse
import time

from rich.console import Console

from flax_customgrad.command import training
from flax_customgrad.command.rows import Rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `codebooks` to a parser."""
    training.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints a row for each way to learn a codebook.

    Returns:
        The exit status: 2 if a package is missing, else 0.
    """
    if missing := training.missing():
        return training.complain("codebooks", missing)
    from flax_customgrad.command.digits import autoencoder

    console, start = Console(highlight=False), time.perf_counter()
    heading = ("gradient and learning", "error", "codes used", "perplexity")
    rows = Rows(console, heading, list(autoencoder.CODEBOOKS), args.markdown)
    for name, arguments in autoencoder.CODEBOOKS.items():
        with console.status(f"training with {name}"):
            found = autoencoder.trained(arguments, args.seeds, args.steps)
        rows.add(
            name,
            (
                f"{100 * found.error.mean():.1f} ± {100 * found.error.std():.1f} %",
                f"{100 * found.usage.mean():.1f} %",
                f"{found.perplexity.mean():.0f}",
            ),
        )
    if not args.markdown:
        console.print(f"{autoencoder.CODES} codes; the error is a share of the pixels' variance")
        console.print(training.summary(args, start))
    return 0
