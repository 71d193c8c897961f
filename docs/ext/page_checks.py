"""A Sphinx extension: the build fails on a page that is too large, loads from another site, or has
a broken link.

Sphinx checks the references that it resolves itself. This looks at the pages as they were written,
so that it sees links in generated HTML too, to other pages and to their parts.

Configuration:
    page_limit: the most bytes that a page of HTML may have; sources and indices are exempt.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:  # The tests call the checks, and need no Sphinx.
    from sphinx.application import Sphinx

_EXEMPT = ("_modules/", "genindex", "py-modindex", "search")
# An element with an address, a link to click on aside; and what a stylesheet names.
_LOADED = re.compile(
    r"(?P<tag><(?!a\s)\w+\s[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*>)"
    r"|(?P<css>(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"';\s]*)"
)


def too_large(pages: dict[str, str], limit: int) -> list[str]:
    """What to say of the pages that are larger than a limit.

    Args:
        pages: the text of each page by its path.
        limit: the most bytes.
    """
    sizes = {path: len(text.encode()) for path, text in pages.items()}
    return [
        f"{path} has {size / 1000:.0f} kB, and a page may have {limit / 1000:.0f}: split it"
        for path, size in sizes.items()
        if size > limit and not path.startswith(_EXEMPT)
    ]


def loaded_from_elsewhere(files: dict[str, str]) -> list[str]:
    """What to say of scripts, styles, fonts and pictures that come from another site.

    Args:
        files: the text of each page and each stylesheet by its path.
    """
    found = (
        (path, match["tag"] or match["css"])
        for path, text in files.items()
        if not path.startswith("_modules/")
        for match in _LOADED.finditer(text)
    )
    return [f"{path} loads from another site: {what}" for path, what in found]


def broken_links(pages: dict[str, str], files: Iterable[str]) -> list[str]:
    """What to say of the links of pages, other than sources, that lead nowhere.

    Args:
        pages: the text of each page by its path.
        files: the paths of all files of the site.
    """
    anchors = {path: set(re.findall(r'\sid="([^"]+)"', text)) for path, text in pages.items()}
    files = set(files)
    problems = []
    for path, text in pages.items():
        if path.startswith("_modules/"):
            continue  # viewcode does not write a source again where only a page has moved.
        for link in sorted(set(re.findall(r'\s(?:href|src)="([^"]*)"', text))):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not (parts.path or parts.fragment):
                continue
            target = _joined(path, unquote(parts.path)) if parts.path else path
            anchor = unquote(parts.fragment)
            if target not in files:
                problems.append(f"{path} links to {link}, which is not there")
            elif anchor and target in anchors and anchor not in anchors[target]:
                problems.append(f"{path} links to {link}, and {target} has no such part")
    return problems


def _joined(page: str, link: str) -> str:
    """The path of a link of a page, from the root of the site."""
    parts: list[str] = page.split("/")[:-1]
    for part in link.split("/"):
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _check(app: "Sphinx", exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    root = Path(app.outdir)
    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    # The theme has templates of its own among the static files.
    written = (f for f in files if f.endswith(".html") and not f.startswith("_static/"))
    pages = {path: (root / path).read_text() for path in written}
    styles = {path: (root / path).read_text() for path in files if path.endswith(".css")}
    problems = too_large(pages, app.config.page_limit) + broken_links(pages, files)
    problems += loaded_from_elsewhere({**pages, **styles})
    if problems:
        from sphinx.errors import ExtensionError

        raise ExtensionError("the pages that were built:\n" + "\n".join(problems))


def setup(app: "Sphinx") -> dict[str, Any]:
    """Registers the checks, which run once all pages are written."""
    app.add_config_value("page_limit", 100_000, "", [int])
    # After the theme, which writes files then too.
    app.connect("build-finished", _check, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
