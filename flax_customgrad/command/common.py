"""What several commands share: error lines, the packages of the extras, and arguments."""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from flax_customgrad import catalogue

INTERRUPTED = 130
"""The exit status of a command that was stopped by Ctrl-C, as shells have it."""

_EXTRAS = {"plot": ("matplotlib",), "train": ("sklearn", "matplotlib", "optax")}
"""What Python imports of each extra of `pyproject.toml` that a command may need."""


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


def missing_package(extra: Literal["plot", "train"]) -> str:
    """Names the first package of an extra that is not installed; "" if all are.

    Args:
        extra: "plot" for pictures, "train" for training.
    """
    for package in _EXTRAS[extra]:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            return f'{error.name} is not installed: pip install "flax-customgrad[{extra}]"'
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


def layer_name(text: str) -> str:
    """Converts an argument, in any case, to the name of a layer in the catalogue.

    Raises:
        argparse.ArgumentTypeError: there is none of that name; it suggests names.
    """
    try:
        return catalogue.find(text).name
    except KeyError as unknown:
        raise argparse.ArgumentTypeError(unknown.args[0]) from None


def time_left(seconds: float, done: int, n: int) -> str:
    """How long the rest takes if it is like what is done; "" before there is anything.

    Args:
        seconds: how long it took so far.
        done: how many are done.
        n: how many there are.
    """
    return f", about {duration(seconds / done * (n - done))} left" if done else ""


def duration(seconds: float) -> str:
    """A time as people say it.

    Args:
        seconds: how many.
    """
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def picture(*suffixes: str) -> Callable[[str], Path]:
    """Makes a type of arguments: a file that a picture is saved in.

    Args:
        *suffixes: how its name may end.

    Returns:
        A function from an argument to a path, which raises argparse.ArgumentTypeError where it does
        not end so or cannot be written.
    """

    def path(text: str) -> Path:
        path = Path(text)
        if path.suffix not in suffixes:
            raise argparse.ArgumentTypeError(
                f"the figure is a {' or '.join(suffixes)} file, got {text!r}"
            )
        return writable(text)

    return path


def writable(text: str) -> Path:
    """Converts an argument to the path of a file that can be written.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {str(path.parent)!r}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}")
    return path


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
