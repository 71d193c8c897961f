"""What several commands share: error lines, the packages of the extra `train`, and arguments."""

import argparse
import importlib
import sys
import time

INTERRUPTED = 130
"""The exit status of a command that was stopped by Ctrl-C, as shells have it."""

_EXTRA = ("sklearn", "matplotlib", "optax")


def print_error(command: str, reason: str, status: int = 2) -> int:
    """Prints an error in one line to stderr.

    Args:
        command: the command that fails.
        reason: why.
        status: the exit status.

    Returns:
        The exit status.
    """
    print(f"flax-customgrad {command}: {reason}", file=sys.stderr)
    return status


def missing_package() -> str:
    """Names the first package of the extra `train` that is not installed; "" if all are."""
    for package in _EXTRA:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            return f'{error.name} is not installed: pip install "flax-customgrad[train]"'
    return ""


def integer(text: str) -> int:
    """Converts an argument to an integer.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def positive_integer(text: str) -> int:
    """Converts an argument to an integer of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    number = integer(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"there must be at least 1, got {number}")
    return number


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a command that trains for several seeds."""
    parser.add_argument(
        "--steps", type=positive_integer, default=1500, help="training steps (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=positive_integer, default=3, help="how many seeds (default: %(default)s)"
    )
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")


def training_summary(args: argparse.Namespace, start: float) -> str:
    """The line below a table: how much was trained, and how long it took.

    Args:
        args: the arguments of the command.
        start: `time.perf_counter()` when it began.
    """
    seconds = time.perf_counter() - start
    return f"digits, seeds: {args.seeds}, steps: {args.steps}, in {seconds:.0f} s"
