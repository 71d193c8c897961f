"""Whole models, converted and as they were written: step, forward, compilation and memory.

python -m benchmarks.models [NAME ...] [--seconds S] [--rounds N] [--tiny] [--json FILE]

    step      the loss and its gradient, jitted
    forward   the model in evaluation, jitted
    trace     the step traced, with all caches empty
    compile   the traced step lowered and compiled
    CPU       the processor's time of these two, all threads; XLA compiles on several
    memory    temporary memory of the step
    x         nnx's number divided by ours, median and quartiles of paired rounds: above 1 we win

The models are those of `benchmarks.zoo`. "converted" is `fcg.convert(model)`; in the last columns
functions that the model calls by name are ours as well, by `fcg.functions()`. What loses comes
first. `benchmarks.compare` compares two files of `--json`.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from benchmarks import programs
from benchmarks.zoo import TASKS
from benchmarks.zoo.task import Task
from flax_customgrad.command import measurements
from flax_customgrad.command.benchmark.paired import compared, paired, pin_allocator
from flax_customgrad.command.benchmark.workloads import SLOWER


@dataclass(frozen=True)
class Row:
    """One quantity of a model in one of its forms, against the model of nnx.

    Attributes:
        model: the name of the model.
        quantity: "step", "forward", one of `programs.STAGES`, or "memory".
        form: "converted" or "functions".
        unit: "ms" or "MB".
        nnx: the median of the model of nnx.
        ours: the median of this form.
        ratio: the median of nnx's divided by ours.
        low: the lower quartile of that ratio.
        high: the upper quartile.
    """

    model: str
    quantity: str
    form: str
    unit: str
    nnx: float
    ours: float
    ratio: float
    low: float
    high: float


def main() -> None:
    """Prints a line per model and quantity, the losing ones first."""
    pin_allocator("benchmarks.models")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(TASKS)}")
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each step")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is compiled")
    parser.add_argument("--tiny", action="store_true", help="the models in the size of tests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to save the rows")
    args = parser.parse_args()
    if unknown := set(args.names) - set(TASKS):
        parser.error(f"no model {', '.join(sorted(unknown))}: there are {', '.join(TASKS)}")
    # A program that was found on disk was not compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    rows: list[Row] = []
    for name in args.names or TASKS:
        print(f"measuring {name}", flush=True)
        rows += measure(name, lambda name=name: TASKS[name](args.tiny), args.seconds, args.rounds)
    print("\n".join(lines(rows)))
    if args.json is not None:
        measurements.write(args.json, map(dataclasses.asdict, rows))


def measure(name: str, make: Callable[[], Task], seconds: float, rounds: int) -> list[Row]:
    """Measures everything of one model.

    Args:
        name: the name of the model.
        make: makes the model and what it is trained on.
        seconds: how long to time the step, and the forward.
        rounds: how often to compile; at least 2.
    """
    forms = programs.variants(make)
    steps = {form: programs.step(*variant) for form, variant in forms.items()}
    forwards = {form: programs.forward(*variant) for form, variant in forms.items()}
    timed = {
        quantity: compared(times) for quantity, times in programs.stages(steps, rounds).items()
    }
    memory = {}
    for quantity, of_quantity in (("step", steps), ("forward", forwards)):
        compiled = {form: program.compile() for form, program in of_quantity.items()}
        if quantity == "step":
            memory = {f: c.memory_analysis().temp_size_in_bytes for f, c in compiled.items()}
        calls = {
            form: lambda call=compiled[form], args=program.arguments: call(*args)
            for form, program in of_quantity.items()
        }
        timed[quantity] = paired(calls, seconds, rounds=7)
    rows = []
    for quantity, timings in timed.items():
        nnx, *ours = timings
        for form in ours:
            t = timings[form]
            times = (timings[nnx].milliseconds, t.milliseconds, t.ratio, t.low, t.high)
            rows.append(Row(name, quantity, form, "ms", *times))
    for form in ("converted", "functions"):
        nbytes, ratio = memory[form], memory["nnx"] / max(1, memory[form])
        sizes = (memory["nnx"] / 1e6, nbytes / 1e6)
        rows.append(Row(name, "memory", form, "MB", *sizes, ratio, ratio, ratio))
    return rows


def lines(rows: list[Row]) -> Iterator[str]:
    """The table: both forms of a quantity in one line, lines with the lowest ratio first.

    Args:
        rows: those of all models.
    """
    pairs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        pairs.setdefault((row.model, row.quantity), []).append(row)
    yield f"\njax {jax.__version__}, {jax.devices()[0].device_kind}"
    yield f"{'':24}{'nnx':>9}     {'converted':33}{'and functions':33}".rstrip()
    for pair in sorted(pairs.values(), key=lambda pair: min(row.ratio for row in pair)):
        first = pair[0]
        label = f"{first.model}: {first.quantity}"
        forms = "".join(f"{_form(row):33}" for row in pair)
        yield f"{label:24}{first.nnx:9.1f} {first.unit}  {forms}".rstrip()
    slower = sum(row.ratio < SLOWER for row in rows)
    yield f"\n{slower or 'none'} of {len(rows)} below {SLOWER}"


def _form(row: Row) -> str:
    return f"{row.ours:9.1f}  x{row.ratio:.2f} [{row.low:.2f}, {row.high:.2f}]"


if __name__ == "__main__":
    main()
