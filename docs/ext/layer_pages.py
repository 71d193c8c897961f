"""A Sphinx extension: writes a page for each layer of the catalogue, and shows their sources."""

import os
import subprocess
import sys
from typing import Any

from layer_files import mathematics_of
from layer_page import page_of
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer

from flax_customgrad import catalogue


def _write(app: Sphinx) -> None:
    # In a process of its own: JAX computes the graphs in threads, which a fork would not survive,
    # and Sphinx forks to read pages in parallel.
    command = [sys.executable, "-m", "write_layer_pages", str(app.srcdir)]
    # The programs of the graphs run once: to optimize them would take longer than it saves.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    subprocess.run(command, check=True, env={**os.environ, "XLA_FLAGS": flags})


def _depend_on_sources(app: Sphinx, docname: str, source: list[str]) -> None:
    """Has a page read again where a file changed that its docstrings or formulas are from."""
    for entry in catalogue.entries():
        if page_of(entry) == docname:
            for module in mathematics_of(entry):
                app.env.note_dependency(str(module.__file__), docname=docname)


def _show_sources(app: Sphinx, env: BuildEnvironment) -> None:
    """Has viewcode show the files of operations too: it shows those of documented names alone."""
    shown = env._viewcode_modules  # type: ignore[attr-defined]
    for entry in catalogue.entries():
        for module in mathematics_of(entry):
            if not shown.get(module.__name__):
                source = ModuleAnalyzer.for_module(module.__name__)
                source.find_tags()
                shown[module.__name__] = source.code, source.tags, {}, module.__name__


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the writing of the pages, before Sphinx looks for what there is."""
    app.connect("builder-inited", _write)
    app.connect("source-read", _depend_on_sources)
    app.connect("env-updated", _show_sources)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
