"""The formulas of a docstring, typeset: from lines of text to a table of MathML.

A block of formulas in the docstring of a layer's file is written for a terminal, in columns:

    forward   x_hat = (x - mean) rstd,  rstd = 1 / sqrt(variance + epsilon)
    kept      x and the parameters

Its first column says what a line is, and what stands below each other stays so. Names become
letters with an index or a hat, quotients fractions, `sum_i` a sum; what does not read as a formula
stays text. The browser lays MathML out itself, so that a page needs no script.
"""

import html
import re
from collections.abc import Iterable, Iterator, Set
from typing import NamedTuple

_GREEK = {
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
_RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "->", "~", ":=", "+="}
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}
_PROSE = {"kept", "source", "at a tie"}
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


def table(block: str, context: str = "") -> str:
    """A block of formulas as an HTML table.

    Args:
        block: its lines, indented alike.
        context: the text that it is from, which may define names that it uses.

    Returns:
        A `table` element, of class "mathematics".
    """
    lines = [line for line in block.splitlines() if line.strip()]
    going_on = {len(line) - len(line.lstrip()) for line in lines if line.lstrip()[0] == "="}
    rows = [_cells(line, going_on) for line in lines]
    names = set(re.findall(r"[A-Za-z]\w*", f"{context}\n{block}"))
    # `sum_g = ...` makes a name of what would be a sum over g.
    names |= {f"{name} =" for name in re.findall(r"(\w+) +=", f"{context}\n{block}")}
    base = min(offset for row in rows for offset, _ in row)
    edges = _edges((offset for row in rows for offset, _ in row), going_on)
    lines, label = ['<table class="mathematics">'], ""
    for row in rows:
        if row[0][0] == base:
            label = _label(row, base)
        lines.append(_row(row, edges, base, names, label in _PROSE))
    return "\n".join((*lines, "</table>"))


def _cells(line: str, going_on: Set[int]) -> list[tuple[int, str]]:
    """The texts of a line that stand apart by two spaces or more, and where each begins.

    Args:
        line: the line.
        going_on: where lines begin that go on from the one above with an equals sign. In a line
            with one in that place a cell begins there, so that the signs stand in a column.
    """
    # Spaces that only align an equals sign, or follow a comma, separate nothing.
    line = re.sub(r"(?<=\S)( +)(?==\s)", lambda m: " " + "\0" * (len(m[1]) - 1), line)
    line = re.sub(r"(?<=[,;])( +)", lambda m: " " + "\0" * (len(m[1]) - 1), line)
    cells = [(m.start(), m[0]) for m in re.finditer(r"\S(?:.*?)(?= {2,}|$)", line)]
    for at in going_on:
        for i, (start, text) in enumerate(cells):
            if start < at < start + len(text) and line[at] == "=":
                cells[i : i + 1] = [(start, text[: at - start]), (at, text[at - start :])]
    return [(start, text.replace("\0", "").strip()) for start, text in cells]


def _edges(offsets: Iterable[int], going_on: Set[int]) -> list[int]:
    """Where columns begin: two up to three characters apart are one, but for equals signs."""
    edges: list[int] = []
    for offset in sorted(set(offsets)):
        if not edges or offset > edges[-1] + 3 or offset in going_on:
            edges.append(offset)
    return edges


def _label(cells: list[tuple[int, str]], base: int) -> str:
    """What the first column says a line is; empty where it does not."""
    (offset, text), *others = cells
    is_label = offset == base and others and "=" not in text + others[0][1][:1]
    return text if is_label else ""


def _row(
    cells: list[tuple[int, str]], edges: list[int], base: int, names: Set[str], is_prose: bool
) -> str:
    """A line as a table row, each cell as wide as up to the next."""
    columns = [max(i for i, edge in enumerate(edges) if edge <= offset) for offset, _ in cells]
    row = [f"<td colspan={columns[0]}></td>"] if columns[0] else []
    label = _label(cells, base)
    for i, (_, text) in enumerate(cells):
        width = (*columns, len(edges))[i + 1] - columns[i]
        span = f" colspan={width}" if width > 1 else ""
        if label and i == 0:
            row.append(f'<th scope="row"{span}>{html.escape(text)}</th>')
        else:
            row.append(f"<td{span}>{prose(text) if is_prose else formula(text, names)}</td>")
    return f"<tr>{''.join(row)}</tr>"


def prose(text: str) -> str:
    """A text in which single letters, and names with an index, are mathematics."""
    # "a byte": the article; "a, h": a variable.
    variable = r"\b(?:[b-zA-Z]|a(?=\W|$)(?! [a-z]{2})|[A-Za-z]+_(?:hat|\w)|(?:d[a-z]))\b"
    variable += rf"|\b(?:{'|'.join(_GREEK)})\b"
    parts = re.split(rf"(`[^`]+`|(?<![\w'.\"-])(?:{variable})(?![\w'.\"-]))", text)
    return "".join(
        f"<code>{html.escape(part.strip('`'))}</code>"
        if part.startswith("`")
        else (_math(_name(part, {part[1:]})) if i % 2 else html.escape(part))
        for i, part in enumerate(parts)
    )


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
            yield space + _math(reader.relation())


def _word(token: _Token) -> str:
    text = html.escape(token.text.strip("`"))
    return f"<code>{text}</code>" if token.text.startswith("`") else text


def _math(content: str) -> str:
    return f'<math displaystyle="true">{content}</math>'


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
            return bool(is_word) and after is not None and after.text not in _GREEK
        return not (after and after.text in ("(", "[", "^") and not after.spaced)

    def in_remark(self) -> bool:
        """Whether a remark goes on: with a word that is followed by no operator."""
        token, after = self.next, self.ahead(1)
        if token is None or token.kind not in ("name", "code"):
            return False
        if token.kind == "code" or token.text in _REMARKS.split():
            return True
        is_word = re.fullmatch(r"[A-Za-z][a-z]{2,}", token.text) and token.text not in _GREEK
        operators = {*_RELATIONS, "(", "[", "^", "+", "/", "*"}
        return bool(is_word) and not (after and after.text in operators)

    def relation(self) -> str:
        # A line may go on from the one above: "= x + y".
        goes_on = self.next is not None and self.next.text in _RELATIONS
        parts = [_operator(self.take().text) if goes_on else "", self.sum()]
        while (token := self.next) is not None and token.text in _RELATIONS:
            parts += [_operator(self.take().text), self.sum()]
        return "".join(parts)

    def sum(self) -> str:
        parts: list[str] = []
        if self.next is not None and self.next.text in ("-", "+"):
            parts.append(_operator(self.take().text))
        parts.append(self.product())
        while (token := self.next) is not None and token.text in ("+", "-"):
            parts += [_operator(self.take().text), self.product()]
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
                factors = [f"<mfrac><mrow>{over}</mrow><mrow>{under}</mrow></mfrac>"]
            elif factors and token.text in ("*", "@", "."):
                factors.append(self._times() + self.factor())
            elif self._at_big_sum():
                factors.append(self._big_sum())
                if self.next is not None and self._starts_factor():
                    factors.append(self.product())
            else:
                gap = '<mspace width="0.17em"/>' if factors else ""
                factors.append(gap + self.factor())
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
            return "<mo>∑</mo>"
        if index:
            inner = _letter(index)
        elif self.next is not None and self.next.text == "{":
            inner = self._group(bare=True)
        else:
            inner = _operator(self.take().text)
        return f"<msub><mo>∑</mo><mrow>{inner}</mrow></msub>"

    def factor(self, bare: bool = False) -> str:
        """A number, a name with indices and arguments, or a group, with its exponent.

        Args:
            bare: leave out the parentheses around the whole, as below a fraction bar.
        """
        token = self.next
        if token is None:
            raise _Unreadable
        if token.text == "-":
            return _operator(self.take().text) + self.factor(bare)
        if token.text == "∂":
            return self._derivative()
        if token.text in ("(", "{", "|"):
            start = self._at
            result = self._group(bare=bare)
            if bare and self.next is not None and self.next.text == "^":
                self._at = start
                result = self._group()
        elif token.kind == "number":
            result = f"<mn>{self.take().text}</mn>"
        elif token.kind == "code":
            result = f"<mtext>{_word(self.take())}</mtext>"
        elif token.text == "...":
            self.take()
            result = _operator("...")
        elif token.kind == "name":
            result = self._quotient_of_differentials() or self._named()
        else:
            raise _Unreadable
        while (
            (token := self.next) is not None and not token.spaced and token.text in ("^", "[", "'")
        ):
            if token.text == "'":
                result = f"<msup><mrow>{result}</mrow>{_operator(self.take().text)}</msup>"
            elif token.text == "[":
                result = f"<msub><mrow>{result}</mrow>{self._group(bare=True)}</msub>"
            else:
                self.take()
                result = f"<msup><mrow>{result}</mrow><mrow>{self._exponent()}</mrow></msup>"
        return result

    def _times(self) -> str:
        """The sign of a product; `.^T` is that of the transposed one."""
        sign = _operator(self.take().text)
        if self.next is None or self.next.text != "^":
            return sign
        self.take()
        return f"<msup>{sign}{_letter(self.take().text)}</msup>"

    def _exponent(self) -> str:
        """What stands above: of `f^T(x)` the T alone."""
        token, after = self.next, self.ahead(1)
        if token is not None and token.text == "T" and after is not None and after.text == "(":
            return _name(self.take().text, self.names)
        return self.factor(bare=True)

    def _derivative(self) -> str:
        """A partial derivative, a quotient of its own: in g ∂y/∂x, g is not above the bar."""
        above = f"<mrow>{_operator(self.take().text)}{self.factor()}</mrow>"
        token, after = self.next, self.ahead(1)
        if token is None or after is None or (token.text, after.text) != ("/", "∂"):
            return above
        self.take()
        below = _operator(self.take().text) + self.factor()
        return f"<mfrac>{above}<mrow>{below}</mrow></mfrac>"

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
        return f"<mfrac>{over}{under}</mfrac>"

    def _named(self) -> str:
        name = self.take().text
        after = self.next
        if name.endswith("_"):
            if after is None or after.text != "{":
                raise _Unreadable
            base = _name(name[:-1], self.names)
            result = f"<msub><mrow>{base}</mrow>{self._group(bare=True)}</msub>"
        elif name == "sqrt" and after is not None and after.text == "(":
            return f"<msqrt>{self._group(bare=True)}</msqrt>"
        else:
            result = _operator("sum") if name == "sum" else _name(name, self.names)
        if (after := self.next) is not None and after.text == "(" and not after.spaced:
            result += f"<mo>&ApplyFunction;</mo>{self._group()}"
        return result

    def _group(self, bare: bool = False) -> str:
        """What stands between brackets, and the brackets unless `bare`."""
        opening = self.take().text
        closing = _CLOSING[opening]
        self._depth += opening == "|"
        parts: list[str] = []
        while self.next is not None and self.next.text != closing:
            if self.next.text in (",", ";", ":"):
                gap = '<mspace width="0.2em"/>'
                parts.append(f"<mo>{self.take().text}</mo>{gap}")
            elif self.at_remark():
                parts.append(f"<mtext>&nbsp;{_word(self.take())}&nbsp;</mtext>")
            elif self.next.text == "...":
                parts.append(_operator(self.take().text))
            else:
                parts.append(self.relation())
        if self.next is None:
            raise _Unreadable
        self.take()
        self._depth -= opening == "|"
        inner = "".join(parts)
        if bare and opening != "|":
            return f"<mrow>{inner}</mrow>"
        return f"<mrow><mo>{opening}</mo>{inner}<mo>{closing}</mo></mrow>"


def _without_parentheses(factors: list[str]) -> str:
    """A product above a fraction bar, where a sum needs no parentheses."""
    opening, closing = "<mrow><mo>(</mo>", "<mo>)</mo></mrow>"
    if len(factors) == 1 and factors[0].startswith(opening):
        return factors[0].removeprefix(opening).removesuffix(closing)
    return "".join(factors)


def _operator(text: str) -> str:
    return f"<mo>{'∑' if text == 'sum' else html.escape(_OPERATORS.get(text, text))}</mo>"


def _letter(name: str) -> str:
    """A name without an index."""
    text = _GREEK.get(name, name)
    return f"<mi>{html.escape(text)}</mi>"


def _name(name: str, names: Set[str]) -> str:
    """A name as a letter with a hat or an index; `dx` is the cotangent d x."""
    head, _, index = name.partition("_")
    if re.fullmatch(r"d[A-Za-z]\w*", head) and (len(head) == 2 or {head[1:], name[1:]} & names):
        return f"<mrow><mi>d</mi>{_name(name[1:], names)}</mrow>"
    if len(head) > 1 and len(index) > 3 and not index.startswith("hat_"):
        return _letter(name)  # `label_smoothing` is one word.
    letter = _letter(head)
    if index == "bar":
        letter, index = f"<mover>{letter}<mo>¯</mo></mover>", ""
    if index == "hat" or index.startswith("hat_"):
        letter, index = f"<mover>{letter}<mo>^</mo></mover>", index[4:]
    if not index:
        return letter
    inner = "<mo>,</mo>".join(_letter(part) for part in index.split("_"))
    return f"<msub>{letter}<mrow>{inner}</mrow></msub>"
