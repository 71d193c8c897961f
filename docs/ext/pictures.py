"""The pictures of a layer's page, as HTML and SVG whose colours are those of the theme.

They are part of the page, so that they turn dark with it, and their text is text.
"""

import html
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flax_customgrad.catalogue import Curve

_WIDTH, _HEIGHT = 300, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 8, 10, 22
_UNITS = ("B", "kB", "MB", "GB")


def graph(curve: Curve, title: str) -> str:
    """A function of one number and its gradient.

    Args:
        curve: the function, and between what numbers to draw it.
        title: the text above it; empty for none.

    Returns:
        A `figure` element.
    """
    u = np.linspace(curve.low, curve.high, 241, dtype=np.float32)
    values, slopes = map(np.asarray, _both(curve)(u))
    low = min(values.min(), slopes.min(), 0.0)
    high = max(values.max(), slopes.max(), 0.0)
    margin = 0.06 * (high - low)
    across = _scale(curve.low, curve.high, _LEFT, _WIDTH - _RIGHT)
    up = _scale(low - margin, high + margin, _HEIGHT - _BOTTOM, _TOP)
    lines = []
    for tick in _ticks(curve.low, curve.high):
        x = across(tick)
        lines.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        lines.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" class="across">{_number(tick)}</text>')
    for tick in _ticks(low - margin, high + margin):
        y = up(tick)
        lines.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        lines.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" class="up">{_number(tick)}</text>')
    for name, heights in (("function", values), ("gradient", slopes)):
        points = [(across(x), up(y)) for x, y in zip(u, heights, strict=True)]
        lines.append(f'<path class="{name}" d="M{_path(points)}"/>')
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    label = "the function and its gradient" + (f", {title}" if title else "")
    return (
        f'<figure class="graph">{caption}<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(lines)}</svg></figure>'
    )


LEGEND = (
    '<p class="legend"><span class="function">the function</span> '
    '<span class="gradient">its gradient</span></p>'
)


def bars(rows: Sequence[tuple[str, int]]) -> str:
    """Bars for numbers of bytes, one below the other.

    Args:
        rows: what each bar stands for, and its bytes.

    Returns:
        A `table` element of class "bars".
    """
    most = max(nbytes for _, nbytes in rows)
    cells = (
        f'<tr><th scope="row">{html.escape(label)}</th><td><span class="bar" '
        f'style="width: {100 * nbytes / most if most else 0:.2f}%"></span></td>'
        f'<td class="number">{size(nbytes)}</td></tr>'
        for label, nbytes in rows
    )
    return f'<table class="bars">{"".join(cells)}</table>'


def size(nbytes: int) -> str:
    """A number of bytes in units of 1000, with three digits."""
    step = min(int(math.log10(nbytes) // 3), len(_UNITS) - 1) if nbytes else 0
    return f"{nbytes / 1000**step:.3g} {_UNITS[step]}"


def _both(curve: Curve):
    @jax.jit
    def values_and_slopes(u):
        # One at a time: what a curve draws at random is then the same for all.
        return curve.function(u), jax.grad(lambda u: jnp.sum(curve.function(u)))(u)

    return values_and_slopes


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (value - low) * (end - start) / (high - low)


def _ticks(low: float, high: float) -> Iterable[float]:
    """Three to six round numbers between two."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "−").replace("−0", "0" if value == 0 else "−0")


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Points as an SVG path, without those from which a straight line is a tenth of a pixel off."""
    kept = sorted({0, *_corners(points, 0, len(points) - 1), len(points) - 1})
    return "L".join(f"{points[i][0]:.1f} {points[i][1]:.1f}" for i in kept)


def _corners(points: Sequence[tuple[float, float]], first: int, last: int) -> set[int]:
    """The points between two that a line of straight pieces needs."""
    (x0, y0), (x1, y1) = points[first], points[last]
    slope = (y1 - y0) / (x1 - x0)
    off = {i: abs(y0 + slope * (points[i][0] - x0) - points[i][1]) for i in range(first + 1, last)}
    worst = max(off, key=off.__getitem__, default=first)
    if off.get(worst, 0.0) < 0.1:
        return set()
    return {worst} | _corners(points, first, worst) | _corners(points, worst, last)
