"""The command line: `python -m flax_customgrad` and one of the commands below."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import NoReturn

from flax_customgrad.command import (
    auditing,
    bench,
    check,
    codebooks,
    common,
    estimators,
    listing,
    quantized,
    train,
)

_COMMANDS = {
    "train": train,
    "estimators": estimators,
    "quantized": quantized,
    "codebooks": codebooks,
    "list": listing,
    "check": check,
    "audit": auditing,
    "bench": bench,
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line; the usage is for `--help`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0 for success, 1 if a command found a fault, 2 for bad arguments or a
        missing package, 130 for Ctrl-C.
    """
    parser = _Parser(
        prog="flax-customgrad",
        description="Flax NNX layers that each carry a hand-written backward pass.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in _COMMANDS.items():
        summary = (command.__doc__ or "").partition("\n")[0]
        subparser = commands.add_parser(name, help=summary, description=summary)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if importlib.util.find_spec("rich") is None:
        return common.print_error(args.command, "rich is not installed: pip install rich")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return common.print_error(args.command, "interrupted", common.INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
