"""The training as it goes: two bars in a terminal, a few plain lines anywhere else."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flax_customgrad.command.digits.comparison import Watch
from flax_customgrad.command.digits.run import Run

_NAMES = ("plain nnx", "converted")
_RECENT = 20
_LINES = 10


@contextmanager
def hidden() -> Iterator[Watch]:
    """Shows nothing."""
    yield lambda plain, converted: None


@contextmanager
def shown(console: Console, steps: int) -> Iterator[Watch]:
    """Shows both runs on a console, with loss and accuracy over the latest batches."""
    if not console.is_interactive:
        yield lambda *runs: _print_now_and_then(console, steps, runs)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[so_far]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = [progress.add_task(name, total=steps, so_far="compiling") for name in _NAMES]

        def watch(*runs: Run) -> None:
            for task, run in zip(tasks, runs, strict=True):
                progress.update(task, completed=len(run.losses), so_far=_so_far(run))

        yield watch


def _print_now_and_then(console: Console, steps: int, runs: tuple[Run, ...]) -> None:
    done = len(runs[0].losses)
    # A line whenever another tenth of the steps is done.
    if done * _LINES // steps > (done - 1) * _LINES // steps:
        said = (f"{name}: {_so_far(run)}" for name, run in zip(_NAMES, runs, strict=True))
        console.print(f"step {done:{len(str(steps))}}/{steps}  {'  '.join(said)}", soft_wrap=True)


def _so_far(run: Run) -> str:
    losses, accuracies = run.losses[-_RECENT:], run.accuracies[-_RECENT:]
    loss, accuracy = sum(losses) / len(losses), sum(accuracies) / len(accuracies)
    return f"loss {loss:.4f} accuracy {100 * accuracy:5.1f}%"
