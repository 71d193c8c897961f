"""Shows every layer of the library.

The table is the catalogue, nothing else: what a layer stands in for, whether its gradient is exact,
what its backward keeps and what it is for.
"""

import argparse
import re
from typing import TYPE_CHECKING

from flax_customgrad import catalogue

if TYPE_CHECKING:
    from rich.text import Text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `list` to a parser."""
    parser.add_argument("--family", type=_family, help="only the layers of this family")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit status, 0."""
    import rich.box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    families = [args.family] if args.family else _families()
    table = Table(box=rich.box.SIMPLE_HEAD)
    for column in ("layer", "gradient"):
        table.add_column(column, no_wrap=True)
    table.add_column("its backward")
    for family in families:
        table.add_row(Text(family, "bold"))
        for entry in catalogue.entries():
            if entry.family == family:
                table.add_row(*_cells(entry))
        table.add_section()
    Console().print(table)
    return 0


def _cells(entry: catalogue.Entry) -> tuple[str, str, "Text"]:
    from rich.text import Text

    facts = {
        "for": entry.stands_for,
        "keeps": entry.keeps,
        "gain": entry.gain,
        "source": _short(entry.source),
    }
    backward = Text("\n").join(
        Text.assemble((f"{label}: ", "dim"), fact) for label, fact in facts.items() if fact
    )
    return f"  {entry.name}", entry.gradient, backward


def _short(source: str) -> str:
    """A GitHub address in the short form that GitHub itself uses, owner/name#number."""
    return re.sub(r"https://github\.com/([^/]+/[^/]+)/(?:issues|pull)/(\d+)", r"\1#\2", source)


def _families() -> list[str]:
    return list(dict.fromkeys(entry.family for entry in catalogue.entries()))


def _family(name: str) -> str:
    if name not in _families():
        raise argparse.ArgumentTypeError(f"no family {name!r}; there are {', '.join(_families())}")
    return name
