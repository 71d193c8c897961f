"""What the commands that train share: the packages that they need, and whole numbers."""

import argparse
import importlib
import sys
import time
from collections.abc import Callable

_EXTRAS = ("sklearn", "matplotlib", "optax")


def missing() -> str:
    """A complaint about the first package of the extra `train` that is not installed, or ""."""
    for extra in _EXTRAS:
        try:
            importlib.import_module(extra)
        except ModuleNotFoundError as error:
            return f'{error.name} is not installed: pip install "flax-customgrad[train]"'
    return ""


def complain(command: str, reason: str, status: int = 2) -> int:
    """Prints a complaint in one line; returns the exit status.

    Args:
        command: which command complains.
        reason: what it complains of.
        status: the exit status.
    """
    print(f"flax-customgrad {command}: {reason}", file=sys.stderr)
    return status


def whole(text: str) -> int:
    """An argument that is a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def at_least(least: int) -> Callable[[str], int]:
    """A type of argument: whole numbers from some number on."""

    def number(text: str) -> int:
        n = whole(text)
        if n < least:
            raise argparse.ArgumentTypeError(f"there must be at least {least}, got {n}")
        return n

    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a command that trains for several seeds."""
    parser.add_argument(
        "--steps", type=at_least(1), default=1500, help="training steps (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=at_least(1), default=3, help="how many seeds (default: %(default)s)"
    )
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")


def summary(args: argparse.Namespace, start: float) -> str:
    """What stands below a table: how much was trained, and for how long."""
    seconds = time.perf_counter() - start
    return f"digits, seeds: {args.seeds}, steps: {args.steps}, in {seconds:.0f} s"
