"""A Sphinx extension: highlighted code without an element around each name, comma and space.

Pygments wraps every token, and most of a page with code is then markup. Names, punctuation and
white space are shown in the colour of the text, and need none.
"""

from typing import Any

from pygments.formatters import HtmlFormatter
from pygments.token import Name, Operator, Punctuation, Text, Token
from sphinx.application import Sphinx
from sphinx.highlighting import PygmentsBridge

_PLAIN = {Name, Name.Namespace, Name.Other, Operator, Punctuation, Punctuation.Marker, Text}
_PLAIN.add(Text.Whitespace)


class LeanFormatter(HtmlFormatter):
    """Writes tokens whose colour is that of the text as text."""

    def format_unencoded(self, tokensource: Any, outfile: Any) -> None:
        """As the parent does, with plain tokens for names and punctuation."""
        super().format_unencoded(
            ((Token if kind in _PLAIN else kind, text) for kind, text in tokensource), outfile
        )


def setup(app: Sphinx) -> dict[str, Any]:
    """Has Sphinx highlight with it."""
    PygmentsBridge.html_formatter = LeanFormatter
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
