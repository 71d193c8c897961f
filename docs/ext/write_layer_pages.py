"""Writes a page for each layer of the catalogue: python -m write_layer_pages DOCS

The pages are `layers/NAME.rst` for a Module and `functions/NAME.rst` for a function, below the
folder of the documentation. Those that did not change are left as they are, so that Sphinx need not
read them.
"""

import sys
from pathlib import Path

from layer_page import FOLDERS, Measurements, page, page_of

from flax_customgrad import catalogue


def write_pages(root: Path) -> None:
    """Writes the page of each layer, and removes those of layers that are gone.

    Args:
        root: the folder of the documentation.
    """
    measured = Measurements.read(root / "data")
    written = {root / f"{page_of(e)}.rst": page(e, measured) for e in catalogue.entries()}
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)
        for stale in set((root / folder).glob("*.rst")) - written.keys():
            stale.unlink()
    for path, text in written.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
