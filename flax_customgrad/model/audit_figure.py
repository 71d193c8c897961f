"""The picture of an audit: two bars for each layer, what flax.nnx keeps and what ours does."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from flax_customgrad.model.audit_report import NNX, OURS, Audit, AuditRow, grouped, nbytes_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From the palette of Okabe and Ito, which most colour-blind readers can tell apart.
_COLORS = {NNX: "#56B4E9", OURS: "#D55E00"}
_MOST_BARS = 16


def svg(report: Audit) -> str:
    """The picture as SVG.

    Args:
        report: the audit.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, text = _drawn(report), io.StringIO()
    import matplotlib

    # Without a date and random names, the same report gives the same picture.
    with matplotlib.rc_context({"svg.hashsalt": report.name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def save(report: Audit, path: Path) -> None:
    """Saves the picture.

    Args:
        report: the audit.
        path: a file whose name ends in `.svg` or `.png`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the name ends otherwise.
    """
    if path.suffix == ".svg":
        path.write_text(svg(report), encoding="utf-8")
    elif path.suffix == ".png":
        _drawn(report).savefig(path, dpi=150)
    else:
        raise ValueError(f"a picture is a .svg or a .png file, got {str(path)!r}")


def _drawn(report: Audit) -> "Figure":
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ModuleNotFoundError as error:
        raise ImportError(
            'the picture needs matplotlib: pip install "flax-customgrad[plot]"'
        ) from error
    bars = _bars(report)
    # A Figure of its own, without pyplot, is drawn by Agg and needs no display.
    figure = Figure(figsize=(9, 1.3 + 0.42 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for k, (form, color) in enumerate(_COLORS.items()):
        label = f"{form}: {nbytes_text(report.kept[form])}"
        places = [place + 0.4 * k for place in range(len(bars))]
        sizes = [kept[k] for _, kept in bars]
        drawn = axes.barh(places, sizes, height=0.38, color=color, label=label)
        axes.bar_label(drawn, [nbytes_text(size) for size in sizes], padding=3, fontsize=8)
    axes.set_yticks([place + 0.2 for place in range(len(bars))], [name for name, _ in bars])
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: nbytes_text(int(size))))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle(f"Kept for the backward of {report.name}", x=0.01, ha="left")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return figure


def _bars(report: Audit) -> list[tuple[str, tuple[int, int]]]:
    """The names and sizes of the layers that keep most, in call order; then all others as one."""
    rows = [row for row in grouped(report.rows) if any(row.kept.values())]
    most = sorted(rows, key=lambda row: -max(row.kept.values()))
    if len(rows) > _MOST_BARS:
        most = most[: _MOST_BARS - 1]
    bars = [(_label(row), (row.kept[NNX], row.kept[OURS])) for row in rows if row in most]
    if others := [row for row in rows if row not in most]:
        sums = [sum(row.kept[form] for row in others) for form in (NNX, OURS)]
        bars.append((f"{len(others)} others", (sums[0], sums[1])))
    return bars


def _label(row: AuditRow) -> str:
    return f"{row.path}  {row.name}"
