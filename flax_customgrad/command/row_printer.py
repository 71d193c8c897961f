"""A table that is printed row by row: columns in a terminal, or Markdown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 14


class RowPrinter:
    """Prints a heading, and then each row as soon as it is known.

    Args:
        console: where to print.
        heading: the title of each column.
        names: what will stand in the first column, which is as wide as the longest of them.
        markdown: whether to print Markdown.
    """

    def __init__(
        self, console: "Console", heading: Sequence[str], names: Sequence[str], markdown: bool
    ):
        self._console = console
        self._markdown = markdown
        self._width = max(map(len, (heading[0], *names)))
        if markdown:
            self._print(_in_markdown(heading))
            self._print("| --- |" + " ---: |" * len(heading[1:]))
        else:
            self._print(self._in_columns(heading), "dim")

    def add(self, name: str, values: Sequence[str], passed: bool = True) -> None:
        """Prints a row.

        Args:
            name: what stands in the first column.
            values: what stands in the others.
            passed: whether the row meets what is asked of it; one that does not is red.
        """
        if self._markdown:
            self._print(_in_markdown((name, *values)))
        else:
            self._print(self._in_columns((name, *values)), "" if passed else "red")

    def _print(self, line: str, style: str = "") -> None:
        from rich.text import Text

        self._console.print(Text(line, style), soft_wrap=True)

    def _in_columns(self, cells: Sequence[str]) -> str:
        name, *values = cells
        return f"{name:{self._width}}" + "".join(f"{value:>{_WIDTH}}" for value in values)


def _in_markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
