"""Shows the layers of the library: a line each, or those of a family, or one in full.

What it shows is the catalogue, nothing else: what a layer stands in for, whether its gradient is
exact, what its backward keeps and what it is for.
"""

import argparse
import inspect
import re
from typing import TYPE_CHECKING

from flax_customgrad import catalogue

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `list` to a parser."""
    parser.add_argument(
        "what", nargs="?", type=_selection, metavar="NAME", help="a family, or a layer; else all"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the lines, or the layer; returns the exit status, 0."""
    from rich.console import Console

    console = Console(highlight=False)
    if isinstance(args.what, catalogue.Entry):
        console.print(_in_full(args.what))
        return 0
    for family in [args.what] if args.what else _families():
        _print_family(console, family, with_facts=args.what is not None)
    if not args.what:
        console.print(
            "\n`list FAMILY` shows what its backwards keep, `list NAME` one layer in full.",
            style="dim",
        )
    return 0


def _print_family(console: "Console", family: str, with_facts: bool) -> None:
    """A heading, and a line for each layer, cut to the width of the terminal; or what it keeps."""
    from rich.padding import Padding
    from rich.text import Text

    console.print(Text(f"\n{family}", "bold"))
    members = [entry for entry in catalogue.entries() if entry.family == family]
    width = max(len(entry.name) for entry in members)
    for entry in members:
        package = entry.stands_for.rpartition(".")[0]
        line = Text(f"  {entry.name:{width}}  ")
        line.append(f"{package:7}", "dim").append(f"{entry.gradient:10} ")
        if not with_facts:
            line.append(entry.gain)
        console.print(line, no_wrap=True, overflow="ellipsis")
        for label, fact in (("keeps", entry.keeps), ("gain", entry.gain)) if with_facts else ():
            console.print(Padding(Text.assemble((f"{label}: ", "dim"), fact), (0, 0, 0, 6)))


def _in_full(entry: catalogue.Entry) -> "Table":
    """Everything that the catalogue says of a layer, label by label."""
    from rich.table import Table
    from rich.text import Text

    signature = inspect.signature(entry.module)
    facts = {
        "layer": Text(f"fcg.{entry.name}", "bold"),
        "family": entry.family,
        "stands for": entry.stands_for,
        "gradient": entry.gradient,
        "keeps": entry.keeps,
        "gain": entry.gain,
        "source": _short(entry.source),
        "arguments": ", ".join(signature.parameters),
        "examples": "; ".join(entry.examples),
        "timed on": "; ".join(entry.workloads),
        "check it": f"python -m flax_customgrad check {entry.name}",
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for label, fact in facts.items():
        if fact:
            grid.add_row(label, fact)
    return grid


def _short(source: str) -> str:
    """A GitHub address in the short form that GitHub itself uses, owner/name#number."""
    return re.sub(r"https://github\.com/([^/]+/[^/]+)/(?:issues|pull)/(\d+)", r"\1#\2", source)


def _families() -> list[str]:
    return list(dict.fromkeys(entry.family for entry in catalogue.entries()))


def _selection(name: str) -> "str | catalogue.Entry":
    """A family, or the entry of a layer; where a name is both but for case, as it is written."""
    if name in _families():
        return name
    try:
        return catalogue.find(name)
    except KeyError as unknown:
        if name.lower() in _families():
            return name.lower()
        families = f"; the families are {', '.join(_families())}"
        raise argparse.ArgumentTypeError(unknown.args[0] + families) from None
