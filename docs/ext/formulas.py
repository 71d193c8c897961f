"""A line of formulas, read by precedence and written as MathML.

`y = a / b c` is a fraction times c, `x_hat` a letter with a hat, `sum_i` a sum. Words of English
are a remark and stay text, as does whatever does not read as a formula.
"""

import html
import re
from collections.abc import Iterator, Set
from typing import NamedTuple

import mathml

_RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "->", "~", ":=", "+="}
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}
_BEFORE_FACTORS = {"(", "{", "/", "*", "@", ".", "∂"}

# Words that begin a remark within a line of formulas.
_REMARKS = """
    a after again all along also an and any are as at axes before below beside both but by each
    element elements else elsewhere every first for from gradient group has if in inside instead
    into is it its largest last like masked means nearest not nothing of on one only or other
    others otherwise outside over per point row rows same so some step steps straight summed
    than that the their then there this to two unless up what when where which whose with within
    without
"""

_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<code>`[^`]+`|\"[^\"]*\")|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)"
    r"|(?P<name>[A-Za-z]{3,}-[a-z]{3,}|[A-Za-z]{2,}'s\b|[A-Za-z](?:\w|\.(?=\w))*)"
    r"|(?P<mark>\.\.\.|<=|>=|!=|->|:=|\+=|.)"
)


class _Token(NamedTuple):
    kind: str
    text: str
    spaced: bool  # a space stands before it


class _Unreadable(Exception):
    """A line that is not a formula."""


def formula(text: str, names: Set[str] = frozenset()) -> str:
    """A line of formulas and remarks as HTML; one that cannot be read as formulas stays text.

    Args:
        text: the line.
        names: every name of the block, to tell `dscale`, the cotangent of a scale, from a name.
    """
    try:
        return "".join(_runs(_Reader(text, names)))
    except _Unreadable:
        return prose(text)


def _runs(reader: "_Reader") -> Iterator[str]:
    """The parts of a line, formulas and remarks in turn."""
    while (token := reader.next) is not None:
        space = " " if token.spaced else ""
        if token.text in ",;:":
            yield html.escape(reader.take().text)
        elif reader.at_remark():
            words = [reader.take()]
            while reader.next is not None and reader.in_remark():
                words.append(reader.take())
            yield space + "".join(
                (" " if w.spaced and i else "") + _word(w) for i, w in enumerate(words)
            )
        else:
            yield space + mathml.math(reader.relation())


def _word(token: _Token) -> str:
    text = html.escape(token.text.strip("`"))
    return f"<code>{text}</code>" if token.text.startswith("`") else text


def prose(text: str) -> str:
    """A text in which single letters, and names with an index, are mathematics."""
    # "a byte": the article; "a, h": a variable.
    variable = r"\b(?:[b-zA-Z]|a(?=\W|$)(?! [a-z]{2})|[A-Za-z]+_(?:hat|\w)|(?:d[a-z]))\b"
    variable += rf"|\b(?:{'|'.join(mathml.GREEK)})\b"
    parts = re.split(rf"(`[^`]+`|(?<![\w'.\"-])(?:{variable})(?![\w'.\"-]))", text)
    return "".join(
        f"<code>{html.escape(part.strip('`'))}</code>"
        if part.startswith("`")
        else (mathml.math(_name(part, {part[1:]})) if i % 2 else html.escape(part))
        for i, part in enumerate(parts)
    )


class _Reader:
    """Reads a line by precedence: relations, sums, products and quotients, factors.

    Args:
        text: the line.
        names: every name of the block.
    """

    def __init__(self, text: str, names: Set[str]):
        self.names = names
        self._tokens: list[_Token] = []
        spaced = False
        for match in _TOKEN.finditer(text):
            if match.lastgroup == "space":
                spaced = True
            else:
                self._tokens.append(_Token(match.lastgroup or "", match[0], spaced))
                spaced = False
        self._at = 0
        self._depth = 0

    @property
    def next(self) -> _Token | None:
        return self.ahead(0)

    def ahead(self, n: int) -> _Token | None:
        at = self._at + n
        return self._tokens[at] if at < len(self._tokens) else None

    def take(self) -> _Token:
        self._at += 1
        return self._tokens[self._at - 1]

    def at_remark(self) -> bool:
        """Whether a word of English is next, and not a name."""
        token, after = self.next, self.ahead(1)
        if token is None or token.text not in _REMARKS.split():
            return False
        if token.text == "a":
            # The article, where a word follows: "a mask".
            is_word = after is not None and after.spaced and re.fullmatch("[a-z]{3,}", after.text)
            return bool(is_word) and after is not None and after.text not in mathml.GREEK
        return not (after and after.text in ("(", "[", "^") and not after.spaced)

    def in_remark(self) -> bool:
        """Whether a remark goes on: with a word that is followed by no operator."""
        token, after = self.next, self.ahead(1)
        if token is None or token.kind not in ("name", "code"):
            return False
        if token.kind == "code" or token.text in _REMARKS.split():
            return True
        is_word = re.fullmatch(r"[A-Za-z][a-z]{2,}", token.text) and token.text not in mathml.GREEK
        operators = {*_RELATIONS, "(", "[", "^", "+", "/", "*"}
        return bool(is_word) and not (after and after.text in operators)

    def relation(self) -> str:
        # A line may go on from the one above: "= x + y".
        goes_on = self.next is not None and self.next.text in _RELATIONS
        parts = [mathml.operator(self.take().text) if goes_on else "", self.sum()]
        while (token := self.next) is not None and token.text in _RELATIONS:
            parts += [mathml.operator(self.take().text), self.sum()]
        return "".join(parts)

    def sum(self) -> str:
        parts: list[str] = []
        if self.next is not None and self.next.text in ("-", "+"):
            parts.append(mathml.operator(self.take().text))
        parts.append(self.product())
        while (token := self.next) is not None and token.text in ("+", "-"):
            parts += [mathml.operator(self.take().text), self.product()]
        return "".join(parts)

    def product(self) -> str:
        factors: list[str] = []
        while self.next is not None and (not factors or self._starts_factor()):
            token = self.next
            if factors and token.text == "/":
                self.take()
                if self.at_remark():
                    raise _Unreadable
                over = _without_parentheses(factors)
                under = self.product() if self._at_big_sum() else self.factor(bare=True)
                factors = [mathml.fraction(over, under)]
            elif factors and token.text in ("*", "@", "."):
                factors.append(self._times() + self.factor())
            elif self._at_big_sum():
                factors.append(self._big_sum())
                if self.next is not None and self._starts_factor():
                    factors.append(self.product())
            else:
                factors.append((mathml.gap(0.17) if factors else "") + self.factor())
        if not factors:
            raise _Unreadable
        return "".join(factors)

    def _starts_factor(self) -> bool:
        token = self.next
        if token is None or self.at_remark():
            return False
        if token.text == "|":
            return self._depth == 0
        return token.kind in ("name", "number", "code") or token.text in _BEFORE_FACTORS

    def _at_big_sum(self) -> bool:
        """Whether `sum` or `sum_i` is next, not sum(...), nor a name that the block defines."""
        token, after = self.next, self.ahead(1)
        if token is None or not re.fullmatch(r"sum(_.*)?", token.text):
            return False
        is_call = after is not None and after.text == "(" and not after.spaced
        return not is_call and f"{token.text} =" not in self.names

    def _big_sum(self) -> str:
        name = self.take().text
        _, has_index, index = name.partition("_")
        if not has_index:
            return mathml.operator("sum")
        if index:
            inner = mathml.letter(index)
        elif self.next is not None and self.next.text == "{":
            inner = self._group(bare=True)
        else:
            inner = mathml.operator(self.take().text)
        return mathml.subscript(mathml.operator("sum"), inner)

    def factor(self, bare: bool = False) -> str:
        """A number, a name with indices and arguments, or a group, with its exponent.

        Args:
            bare: leave out the parentheses around the whole, as below a fraction bar.
        """
        token = self.next
        if token is None:
            raise _Unreadable
        if token.text == "-":
            return mathml.operator(self.take().text) + self.factor(bare)
        if token.text == "∂":
            return self._derivative()
        if token.text in ("(", "{", "|"):
            start = self._at
            result = self._group(bare=bare)
            if bare and self.next is not None and self.next.text == "^":
                self._at = start
                result = self._group()
        elif token.kind == "number":
            result = mathml.number(self.take().text)
        elif token.kind == "code":
            result = mathml.text(_word(self.take()))
        elif token.text == "...":
            self.take()
            result = mathml.operator("...")
        elif token.kind == "name":
            result = self._quotient_of_differentials() or self._named()
        else:
            raise _Unreadable
        while (
            (token := self.next) is not None and not token.spaced and token.text in ("^", "[", "'")
        ):
            if token.text == "'":
                result = mathml.superscript(result, mathml.operator(self.take().text))
            elif token.text == "[":
                result = mathml.subscript(result, self._group(bare=True))
            else:
                self.take()
                result = mathml.superscript(result, self._exponent())
        return result

    def _times(self) -> str:
        """The sign of a product; `.^T` is that of the transposed one."""
        sign = mathml.operator(self.take().text)
        if self.next is None or self.next.text != "^":
            return sign
        self.take()
        return mathml.superscript(sign, mathml.letter(self.take().text))

    def _exponent(self) -> str:
        """What stands above: of `f^T(x)` the T alone."""
        token, after = self.next, self.ahead(1)
        if token is not None and token.text == "T" and after is not None and after.text == "(":
            return _name(self.take().text, self.names)
        return self.factor(bare=True)

    def _derivative(self) -> str:
        """A partial derivative, a quotient of its own: in g ∂y/∂x, g is not above the bar."""
        above = mathml.operator(self.take().text) + self.factor()
        token, after = self.next, self.ahead(1)
        if token is None or after is None or (token.text, after.text) != ("/", "∂"):
            return mathml.row(above)
        self.take()
        below = mathml.operator(self.take().text) + self.factor()
        return mathml.fraction(above, below)

    def _quotient_of_differentials(self) -> str:
        """dl/dz, written without spaces: a derivative, which is a quotient of its own."""
        above, bar, below = self.next, self.ahead(1), self.ahead(2)
        if above is None or bar is None or below is None:
            return ""
        parts = f"{above.text}{' ' * bar.spaced}{bar.text}{' ' * below.spaced}{below.text}"
        if not re.fullmatch(r"d[a-z]\w*/d[a-z]\w*", parts):
            return ""
        over, under = (_name(token.text, self.names) for token in (above, below))
        self._at += 3
        return mathml.fraction(over, under)

    def _named(self) -> str:
        name = self.take().text
        after = self.next
        if name.endswith("_"):
            if after is None or after.text != "{":
                raise _Unreadable
            base = _name(name[:-1], self.names)
            result = mathml.subscript(base, self._group(bare=True))
        elif name == "sqrt" and after is not None and after.text == "(":
            return mathml.root(self._group(bare=True))
        else:
            result = mathml.operator("sum") if name == "sum" else _name(name, self.names)
        if (after := self.next) is not None and after.text == "(" and not after.spaced:
            result += mathml.APPLY + self._group()
        return result

    def _group(self, bare: bool = False) -> str:
        """What stands between brackets, and the brackets unless `bare`."""
        opening = self.take().text
        closing = _CLOSING[opening]
        self._depth += opening == "|"
        parts: list[str] = []
        while self.next is not None and self.next.text != closing:
            if self.next.text in (",", ";", ":"):
                parts.append(mathml.operator(self.take().text) + mathml.gap(0.2))
            elif self.at_remark():
                parts.append(mathml.text(f"&nbsp;{_word(self.take())}&nbsp;"))
            elif self.next.text == "...":
                parts.append(mathml.operator(self.take().text))
            else:
                parts.append(self.relation())
        if self.next is None:
            raise _Unreadable
        self.take()
        self._depth -= opening == "|"
        inner = "".join(parts)
        if bare and opening != "|":
            return inner
        return mathml.row(mathml.operator(opening) + inner + mathml.operator(closing))


def _without_parentheses(factors: list[str]) -> str:
    """A product above a fraction bar, where a sum needs no parentheses."""
    opening, closing = "<mrow><mo>(</mo>", "<mo>)</mo></mrow>"
    if len(factors) == 1 and factors[0].startswith(opening):
        return factors[0].removeprefix(opening).removesuffix(closing)
    return "".join(factors)


def _name(name: str, names: Set[str]) -> str:
    """A name as a letter with a hat or an index; `dx` is the cotangent d x."""
    head, _, index = name.partition("_")
    if re.fullmatch(r"d[A-Za-z]\w*", head) and (len(head) == 2 or {head[1:], name[1:]} & names):
        return mathml.row(mathml.letter("d") + _name(name[1:], names))
    if len(head) > 1 and len(index) > 3 and not index.startswith("hat_"):
        return mathml.letter(name)  # `label_smoothing` is one word.
    letter = mathml.letter(head)
    if index == "bar":
        letter, index = mathml.accent(letter, "¯"), ""
    if index == "hat" or index.startswith("hat_"):
        letter, index = mathml.accent(letter, "^"), index[4:]
    if not index:
        return letter
    inner = mathml.operator(",").join(mathml.letter(part) for part in index.split("_"))
    return mathml.subscript(letter, inner)
