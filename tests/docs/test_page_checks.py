"""What fails a build of the documentation once its pages are written."""

import runpy
from pathlib import Path

import pytest

CHECKS = runpy.run_path(str(Path(__file__).parents[2] / "docs/ext/page_checks.py"))


@pytest.mark.parametrize(
    "text",
    [
        '<script defer src="https://cdn.example/tex-mml-chtml.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css" />',
        "<img alt='' src='http://example/a.png'>",
        "@import 'https://fonts.example/a.css';",
        "src: url( //fonts.example/a.woff2)",
    ],
)
def test_a_page_loads_nothing_from_another_site(text):
    (problem,) = CHECKS["loaded_from_elsewhere"]({"a.html": text})
    assert problem.startswith("a.html loads from another site: ")
    assert "example" in problem


@pytest.mark.parametrize(
    "text",
    [
        '<a class="reference" href="https://arxiv.org/abs/1606.08415">',
        '<script src="_static/doctools.js"></script> <code>src="https://...</code>',
        "<p>as in url(https)</p>",
        "src: url(../fonts/a.woff2) url(data:image/svg+xml,x)",
    ],
)
def test_a_page_may_link_to_another_site(text):
    assert not CHECKS["loaded_from_elsewhere"]({"a.html": text})


def test_links_lead_somewhere():
    pages = {"a.html": '<a href="b.html#there"> <a href="b.html#gone"> <a href="c.html">'}
    pages["b.html"] = '<h1 id="there">'
    assert CHECKS["broken_links"](pages, pages) == [
        "a.html links to b.html#gone, and b.html has no such part",
        "a.html links to c.html, which is not there",
    ]


def test_pages_are_small():
    pages = {"a.html": "x" * 2001, "b.html": "x" * 2000, "genindex.html": "x" * 9000}
    assert CHECKS["too_large"](pages, 2000) == ["a.html has 2 kB, and a page may have 2: split it"]
