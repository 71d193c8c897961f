"""What the commands that train share: the packages that they need, and whole numbers."""

import argparse
import importlib
import sys
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
