"""A Sphinx extension: writes the catalogue into the page that asks for it.

The line `<!-- the catalogue -->` of a page is replaced by a section per family, each a table of
its layers, made from `flax_customgrad.catalogue`.
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any

from sphinx.application import Sphinx

from flax_customgrad import catalogue

MARK = "<!-- the catalogue -->"
_HEAD = (
    "layer, and what it replaces",
    "gradient",
    "the backward keeps",
    "purpose and source",
)
_WIDTHS = (26, 14, 25, 35)

_TITLES = {
    "conv": "Convolution",
    "weight_norms": "Normalization of weights",
    "invertible": "Invertible layers",
    "activation": "Activations",
    "recurrent": "Recurrent layers",
    "rounding": "Straight-through estimators",
    "categorical": "Categorical choices",
    "codebook": "Codebooks",
    "sparse": "N:M sparsity",
    "fp8": "fp8 layers",
    "quant_layers": "Quantized layers",
    "frozen": "Frozen weights",
    "int8": "int8 layers",
    "spiking": "Spiking neurons",
    "shaping": "Gradient shaping",
    "feedback": "Feedback alignment",
    "few_bit": "Few-bit activations",
}
"""Headings of families whose name alone is none."""


def markdown(entries: Iterable[catalogue.Entry]) -> str:
    """The catalogue as MyST Markdown."""
    sections = []
    for family, layers in itertools.groupby(entries, lambda entry: entry.family):
        title = _TITLES.get(family, family.replace("_", " ").capitalize())
        options = f":header-rows: 1\n:widths: {' '.join(map(str, _WIDTHS))}\n:class: catalogue"
        rows = "\n".join(map(_listed, [_HEAD, *map(_row, layers)]))
        sections.append(f"## {title}\n\n```{{list-table}}\n{options}\n\n{rows}\n```\n")
    return "\n".join(sections)


def _listed(row: Iterable[str]) -> str:
    """A row as list-table wants it; a blank line in a cell starts a paragraph."""
    cells = [cell.replace("\n\n", "\n\n    ") for cell in row]
    return "* - " + "\n  - ".join(cells)


def _row(entry: catalogue.Entry) -> tuple[str, ...]:
    name = f"{{py:{'func' if entry.is_function else 'class'}}}`~flax_customgrad.{entry.name}`"
    if entry.is_drop_in:
        name += f"\n\nfor `{entry.stands_for}`"
    gain = _escaped(entry.gain)
    if entry.source:
        gain += f"\n\n{_linked(entry.source)}"
    return name, entry.gradient, _escaped(entry.keeps), gain


def _linked(source: str) -> str:
    """A source as a link: an arXiv number, an issue, or the text as it is."""
    if match := re.fullmatch(r"arXiv:([\w./-]+)", source):
        return f"[{source}](https://arxiv.org/abs/{match[1]})"
    if match := re.fullmatch(r"https://github\.com/([\w./-]+)/(?:issues|pull)/(\d+)", source):
        return f"[{match[1]}#{match[2]}]({source})"
    return f"<{source}>" if source.startswith("https://") else _escaped(source)


def _escaped(text: str) -> str:
    """A text that Markdown shows as it is; what stands in backticks is code."""
    pattern = r"(`[^`]+`)|([\\`*_|<>\[\]{}$])"
    return re.sub(pattern, lambda match: match[1] or rf"\{match[2]}", text)


def _write(app: Sphinx, docname: str, source: list[str]) -> None:
    if MARK in source[0]:
        source[0] = source[0].replace(MARK, markdown(catalogue.entries()))


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the replacement."""
    app.connect("source-read", _write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
