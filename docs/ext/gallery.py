"""A Sphinx extension: writes the catalogue into the pages that ask for it.

Three lines of a page are replaced:

    <!-- the catalogue -->  by the families and the names of their layers
    <!-- the family -->     on `families/NAME.md`, by a table of the layers of that family
    <!-- the names -->      by every public name, in alphabetical order
"""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coverage_check import public_names
from layer_page import page_of
from sources import link
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from flax_customgrad import catalogue

_HEAD = (
    "layer, and what it replaces",
    "gradient",
    "the backward keeps",
    "purpose and source",
)
_WIDTHS = (26, 14, 25, 35)


def families() -> list[str]:
    """The names of the families, in the order of the catalogue."""
    return list(dict.fromkeys(entry.family for entry in catalogue.entries()))


def overview() -> str:
    """The families and the names of their layers, as MyST Markdown."""
    rows = [
        (f"[](families/{family}.md)", ", ".join(_link(entry) for entry in _members(family)))
        for family in families()
    ]
    pages = "\n".join(f"families/{family}" for family in families())
    table = _table(("family", "layers"), rows, (25, 75))
    return f"{table}\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"


def family(name: str) -> str:
    """The layers of a family: a table, and the pages for the sidebar.

    Args:
        name: the family, as the folder that holds it.
    """
    pages = "\n".join(f"/{page_of(entry)}" for entry in _members(name))
    table = _table(_HEAD, map(_row, _members(name)), _WIDTHS)
    return f"{table}\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"


def all_names(modules: Iterable[str]) -> str:
    """Every public name of some modules, as links.

    Args:
        modules: full names of the modules; the first one's names are shown without it.
    """
    first, *others = modules
    names = [(name, f"{first}.{name}") for name in public_names(importlib.import_module(first))]
    for module in others:
        short = module.removeprefix(f"{first}.")
        public = public_names(importlib.import_module(module))
        names += [(f"{short}.{name}", f"{module}.{name}") for name in public]
    links = "\n".join(
        f"- {{py:obj}}`{shown} <{full}>`" for shown, full in sorted(names, key=_without_case)
    )
    return f"::::{{container}} names\n\n{links}\n\n::::\n"


def _without_case(name: tuple[str, str]) -> tuple[str, str]:
    return name[0].lower(), name[0]


def _members(name: str) -> list[catalogue.Entry]:
    return [entry for entry in catalogue.entries() if entry.family == name]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], widths: Iterable[int]) -> str:
    options = f":header-rows: 1\n:widths: {' '.join(map(str, widths))}\n:class: catalogue"
    listed = "\n".join(map(_listed, [head, *rows]))
    return f"```{{list-table}}\n{options}\n\n{listed}\n```\n"


def _listed(row: Iterable[str]) -> str:
    """A row as list-table wants it; a blank line in a cell starts a paragraph."""
    cells = [cell.replace("\n\n", "\n\n    ") for cell in row]
    return "* - " + "\n  - ".join(cells)


def _link(entry: catalogue.Entry) -> str:
    return f"[{_escaped(entry.name)}](/{page_of(entry)}.rst)"


def _row(entry: catalogue.Entry) -> tuple[str, ...]:
    name = _link(entry)
    if entry.is_drop_in:
        name += f"\n\nfor `{entry.stands_for}`"
    gain = _escaped(entry.gain)
    if entry.source:
        gain += f"\n\n{_linked(entry.source)}"
    return name, entry.gradient, _escaped(entry.keeps), gain


def _linked(source: str) -> str:
    text, address = link(source)
    return f"[{_escaped(text)}]({address})" if address else _escaped(text)


def _escaped(text: str) -> str:
    """A text that Markdown shows as it is; what stands in backticks is code."""
    pattern = r"(`[^`]+`)|([\\`*_|<>\[\]{}$])"
    return re.sub(pattern, lambda match: match[1] or rf"\{match[2]}", text)


def _write(app: Sphinx, docname: str, source: list[str]) -> None:
    folder, _, name = docname.rpartition("/")
    if "<!-- the catalogue -->" in source[0]:
        source[0] = source[0].replace("<!-- the catalogue -->", overview())
    if "<!-- the family -->" in source[0]:
        source[0] = source[0].replace("<!-- the family -->", family(name))
    if "<!-- the names -->" in source[0]:
        names = all_names(app.config.coverage_modules)
        source[0] = source[0].replace("<!-- the names -->", names)
    if folder == "families" and name not in families():
        raise ExtensionError(f"docs/{docname}.md: the catalogue has no family {name!r}")


def _check_families(app: Sphinx) -> None:
    for name in families():
        path = Path(app.srcdir) / "families" / f"{name}.md"
        if not path.exists():
            raise ExtensionError(
                f"the family {name!r} has no page. Write docs/families/{name}.md: a heading, a "
                "sentence, and the line <!-- the family -->"
            )


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the replacement, and the check that each family has a page."""
    app.connect("builder-inited", _check_families)
    app.connect("source-read", _write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
