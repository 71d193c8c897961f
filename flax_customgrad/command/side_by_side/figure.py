"""The figure: the loss curves of both runs, and how far the first gradients are apart."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flax_customgrad.command.side_by_side.comparison import GRADIENT_TOLERANCE, RunComparison

# From the palette of Okabe and Ito, which most colour-blind readers can tell apart.
_PLAIN, _CONVERTED = "#56B4E9", "#D55E00"
_SMALLEST, _LARGEST = 1e-9, 10.0


def save(result: RunComparison, path: Path) -> None:
    """Draws the figure of a comparison and saves it as PNG."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_losses(left, result)
    _draw_gradients(right, result)
    figure.suptitle(f"{result.task.title}, {result.steps} steps, seed {result.seed}")
    # A Figure of its own, without pyplot, is drawn by Agg and needs no display.
    figure.savefig(path, dpi=150)


def _draw_losses(axes: Axes, result: RunComparison) -> None:
    steps = range(1, result.steps + 1)
    marker = "o" if result.steps == 1 else None
    for run, name, style in (
        (result.plain, "plain nnx", {"color": _PLAIN, "linewidth": 3}),
        (result.converted, "converted", {"color": _CONVERTED, "linewidth": 0.9}),
    ):
        label = f"{name}, test accuracy {run.test_accuracy:.1%}"
        axes.plot(steps, run.losses, label=label, marker=marker, **style)
    axes.set(title="Loss", xlabel="step", ylabel="cross-entropy of the batch", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def _draw_gradients(axes: Axes, result: RunComparison) -> None:
    names, differences = list(result.gradients), list(result.gradients.values())
    # A bar on a logarithmic axis has to end somewhere, for a difference of 0 and for one of inf.
    lengths = [min(max(difference, _SMALLEST), _LARGEST) for difference in differences]
    bars = axes.barh(names, lengths, color=_CONVERTED, height=0.6)
    axes.bar_label(bars, [f"{d:.0e}" if d else "identical" for d in differences], padding=4)
    axes.axvline(
        GRADIENT_TOLERANCE, color="0.4", linestyle="--", linewidth=1, label="largest allowed"
    )
    axes.set(
        title="Gradients at the first step",
        xlabel="largest difference, relative to the largest value",
        xscale="log",
        xlim=(_SMALLEST, 30 * max(GRADIENT_TOLERANCE, *lengths)),
    )
    axes.invert_yaxis()
    axes.legend(frameon=False)
