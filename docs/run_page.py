"""Runs the code of a page as a reader does who copies it into one script.

    python docs/run_page.py docs/quickstart.md

Each cell is printed before its output. An error ends the run, with the line of the page in its
traceback. Pages that use commands of the notebook, such as `%%writefile`, run in Sphinx alone.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CELL = re.compile(r"^```\{code-cell\} ipython3\n(?::[^\n]*\n)*(.*?)^```$", re.M | re.S)


def cells(page: Path) -> Iterator[tuple[int, str]]:
    """The code cells of a page.

    Args:
        page: a file of MyST Markdown.

    Yields:
        The number of lines above a cell, and its code.
    """
    text = page.read_text()
    for match in _CELL.finditer(text):
        yield text.count("\n", 0, match.start(1)), match[1]


def run(page: Path, *, show: bool = False) -> dict[str, Any]:
    """Runs the cells of a page one after the other.

    Args:
        page: a file of MyST Markdown.
        show: whether each cell is printed before it runs.

    Returns:
        The names that the page has defined.
    """
    import matplotlib

    matplotlib.use("template")  # draws nothing
    names: dict[str, Any] = {"__name__": "__main__"}
    for above, code in cells(page):
        if show:
            print("\n".join(f">>> {line}" for line in code.splitlines()))
        # Blank lines above, so that a traceback names the line of the page.
        exec(compile("\n" * above + code, str(page), "exec"), names)
    return names


if __name__ == "__main__":
    run(Path(sys.argv[1]), show=True)
