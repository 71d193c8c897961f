"""Elements of MathML, which the browser lays out itself, so that a page needs no script."""

import html
import re

GREEK = {
    "alpha": "α",
    "beta": "β",
    "gamma": "γ",
    "delta": "δ",
    "epsilon": "ε",
    "theta": "θ",
    "lambda": "λ",
    "mu": "μ",
    "nu": "ν",
    "pi": "π",
    "rho": "ρ",
    "sigma": "σ",
    "tau": "τ",
    "phi": "φ",
}
_OPERATORS = {
    "<=": "≤",
    ">=": "≥",
    "!=": "≠",
    "->": "→",
    "-": "−",
    "*": "·",
    ".": "·",
    "...": "…",
    "'": "′",
}
APPLY = "<mo>&ApplyFunction;</mo>"
"""Stands between a function and its argument; nobody sees it."""
_LEAF = re.compile(r"<(m[ino])>[^<]*</\1>")


def math(content: str) -> str:
    """A formula within text, with the large sums and fractions of one that stands alone."""
    return f'<math displaystyle="true">{content}</math>'


def row(content: str) -> str:
    """Several elements as one; one letter, number or operator is one already."""
    return content if _LEAF.fullmatch(content) else f"<mrow>{content}</mrow>"


def letter(name: str) -> str:
    """A name without an index: a variable, or a Greek letter."""
    return f"<mi>{html.escape(GREEK.get(name, name))}</mi>"


def number(text: str) -> str:
    """A number."""
    return f"<mn>{text}</mn>"


def operator(text: str) -> str:
    """An operator, a relation or a bracket, as ASCII has it; "sum" is the sign of a sum."""
    return f"<mo>{'∑' if text == 'sum' else html.escape(_OPERATORS.get(text, text))}</mo>"


def gap(em: float) -> str:
    """A space as wide as a part of an em."""
    return f'<mspace width="{em}em"/>'


def fraction(over: str, under: str) -> str:
    """A quotient, with a bar."""
    return f"<mfrac>{row(over)}{row(under)}</mfrac>"


def subscript(base: str, index: str) -> str:
    """An index."""
    return f"<msub>{row(base)}{row(index)}</msub>"


def superscript(base: str, above: str) -> str:
    """An exponent, or a prime."""
    return f"<msup>{row(base)}{row(above)}</msup>"


def accent(base: str, mark: str) -> str:
    """A hat or a bar above a letter."""
    return f"<mover>{base}<mo>{mark}</mo></mover>"


def root(content: str) -> str:
    """A square root."""
    return f"<msqrt>{content}</msqrt>"


def text(content: str) -> str:
    """A word of a remark, or code, within a formula.

    Args:
        content: the word as HTML.
    """
    return f"<mtext>{content}</mtext>"
