"""Sphinx configuration. The pages are executed at every build, and a warning is an error."""

import os
import sys
from pathlib import Path

import flax_customgrad

sys.path.insert(0, str(Path(__file__).parent / "ext"))
# What is documented is what Python imports; the kernels that run the pages import the same.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))

project = "flax-customgrad"
author = "The flax-customgrad developers"
project_copyright = author
version = release = flax_customgrad.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "coverage_check",
    "docstrings",
    "formula_directive",
    "gallery",
    "layer_pages",
    "lean_highlighting",
    "measured_tables",
    "page_checks",
]
exclude_patterns = ["_build", "ext"]

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    # With the pages of all layers, the sidebar would be most of every page.
    "collapse_navbar": True,
    # The sidebar has a search field; a second one in a bar on top is one too many.
    "navbar_persistent": [],
    # It would offer the sources of the pages, which are not part of the site.
    "use_download_button": False,
}
html_copy_source = False

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
# An output on stderr is a warning that somebody ought to see: it fails the build.
nb_output_stderr = "warn"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# In a docstring `name` is a link where the name is documented here, and code elsewhere.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

coverage_modules = [
    "flax_customgrad",
    "flax_customgrad.testing",
    "flax_customgrad.catalogue",
    "flax_customgrad.surrogate",
]
