"""The progress of training: two bars in a terminal, ten plain lines anywhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flax_customgrad.command.side_by_side.comparison import Watch
from flax_customgrad.command.side_by_side.training_run import TrainingRun

if TYPE_CHECKING:
    from rich.console import Console

_NAMES = ("plain nnx", "converted")
_RECENT = 20
_LINES = 10


@contextmanager
def silent() -> Iterator[Watch]:
    """Shows nothing."""
    yield lambda plain, converted: None


@contextmanager
def on_console(console: "Console", steps: int) -> Iterator[Watch]:
    """Shows both runs on a console, with loss and accuracy over the latest batches."""
    if not console.is_interactive:
        yield lambda *runs: _print_every_tenth(console, steps, runs)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[recent]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(name, total=steps, recent="compiling") for name in _NAMES]

        def watch(*runs: TrainingRun) -> None:
            for task, run in zip(tasks, runs, strict=True):
                progress.update(task, completed=len(run.losses), recent=_recent_means(run))

        yield watch


def _print_every_tenth(console: "Console", steps: int, runs: tuple[TrainingRun, ...]) -> None:
    done = len(runs[0].losses)
    # A line whenever another tenth of the steps is done.
    if done * _LINES // steps > (done - 1) * _LINES // steps:
        means = (f"{name}: {_recent_means(run)}" for name, run in zip(_NAMES, runs, strict=True))
        console.print(f"step {done:{len(str(steps))}}/{steps}  {'  '.join(means)}", soft_wrap=True)


def _recent_means(run: TrainingRun) -> str:
    losses, accuracies = run.losses[-_RECENT:], run.accuracies[-_RECENT:]
    loss, accuracy = sum(losses) / len(losses), sum(accuracies) / len(accuracies)
    return f"loss {loss:.4f} accuracy {100 * accuracy:5.1f}%"
