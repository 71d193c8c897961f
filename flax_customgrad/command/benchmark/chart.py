"""The chart of a benchmark: how much faster each workload is, and what its backward keeps."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from flax_customgrad.command.benchmark.workloads import SLOWER, Measurement

# From the palette of Okabe and Ito, which most colour-blind readers can tell apart.
_FASTER, _SLOWER = "#0072B2", "#D55E00"


def save(done: Sequence[Measurement], path: Path) -> None:
    """Draws the chart and saves it.

    Args:
        done: the measurements, from above to below.
        path: a file whose name ends in `.svg` or `.png`.
    """
    places = range(len(done))
    figure = Figure(figsize=(11, 1.6 + 0.24 * len(done)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    _draw_speed(speed, done)
    _draw_memory(memory, done)
    speed.set_yticks(places, [f"{m.layer}, {m.workload}" for m in done])
    speed.set_ylim(len(done) - 0.4, -0.6)
    for axes in (speed, memory):
        axes.axvline(1, color="0.4", linewidth=1)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    # A Figure of its own, without pyplot, is drawn by Agg and needs no display.
    figure.savefig(path, dpi=150)


def _draw_speed(axes: Axes, done: Sequence[Measurement]) -> None:
    for place, measured in enumerate(done):
        color = _SLOWER if measured.ratio < SLOWER else _FASTER
        axes.plot([measured.low, measured.high], [place, place], color=color, linewidth=1.5)
        axes.plot(measured.ratio, place, "o", color=color, markersize=4)
    axes.set_xscale("log")
    low, high = min(m.low for m in done), max(m.high for m in done)
    ticks = [
        t for t in (0.1, 0.2, 0.5, 0.8, 1, 1.25, 2, 5, 10, 20, 50, 100) if low / 2 < t < high * 2
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title("Times as fast as the baseline, with quartiles", loc="left", fontsize=10)


def _draw_memory(axes: Axes, done: Sequence[Measurement]) -> None:
    for place, measured in enumerate(done):
        kept = measured.kept_bytes
        if kept.baseline is None or kept.ours is None:
            continue
        share = kept.ours / kept.baseline if kept.baseline else 0.0
        axes.barh(place, share, height=0.55, color=_SLOWER if share > 1 else _FASTER)
        text = f"{share:.0%}" if kept.baseline else "both keep nothing"
        axes.text(share + 0.01, place, text, va="center", fontsize=8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_title("Kept for the backward, of the baseline's bytes", loc="left", fontsize=10)
