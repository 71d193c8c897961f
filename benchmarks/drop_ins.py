"""Drop-ins beside flax.nnx in what `bench` leaves out: the output alone, and bfloat16.

python -m benchmarks.drop_ins [NAME ...] [--seconds S] [--json FILE]

    forward           the output, jitted, in the dtype of the workload
    forward, bf16     parameters and inputs in bfloat16
    step, bf16        value and gradient of that
    x                 nnx's time divided by ours, median and quartiles of paired rounds

The workloads are those of the catalogue. What loses comes first.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad import catalogue
from flax_customgrad.command import measurements
from flax_customgrad.command.benchmark.paired import Timing, paired, pin_allocator
from flax_customgrad.command.benchmark.steps import Step, forward, in_dtype, step
from flax_customgrad.command.benchmark.workloads import SLOWER
from flax_customgrad.registry.entry import Entry


@dataclass(frozen=True)
class Row(Timing):
    """What one program of a workload took, and how much faster than that of nnx it is.

    Attributes:
        layer: the name of the layer.
        workload: the name of the workload.
        program: one of `PROGRAMS`.
    """

    layer: str
    workload: str
    program: str

    def __str__(self) -> str:
        return f"{f'{self.layer}: {self.workload}, {self.program}':64} {super().__str__()}"


def _in_half(program: Callable[..., Any]) -> Callable[..., Any]:
    return lambda example: program(in_dtype(example, jnp.bfloat16))


PROGRAMS = {
    "forward": forward,
    "forward, bf16": _in_half(forward),
    "step, bf16": _in_half(step),
}


def main() -> None:
    """Prints a line for each program of each workload, the losing ones first."""
    pin_allocator("benchmarks.drop_ins")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="drop-ins; all by default")
    parser.add_argument("--seconds", type=float, default=1.5, help="time spent on each program")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to save the rows")
    args = parser.parse_args()
    entries = [catalogue.find(name) for name in args.names]
    if others := [entry.name for entry in entries if not entry.is_drop_in]:
        parser.error(f"{', '.join(others)}: flax.nnx has no such layer to compare with")
    rows: list[Row] = []
    for entry in entries or catalogue.entries():
        if entry.is_drop_in:
            rows += measure(entry, args.seconds)
    rows.sort(key=lambda row: row.ratio)
    print(f"\njax {jax.__version__}, {jax.devices()[0].device_kind}", *rows, sep="\n")
    slower = sum(row.ratio < SLOWER for row in rows)
    print(f"\n{slower or 'none'} of {len(rows)} below {SLOWER}")
    if args.json is not None:
        measurements.write(args.json, map(dataclasses.asdict, rows))


def measure(entry: Entry, seconds: float) -> list[Row]:
    """Measures the programs of all workloads of a layer.

    Args:
        entry: a drop-in.
        seconds: how long to time each program.
    """
    rows = []
    for (workload, make), (name, program) in itertools.product(
        entry.workloads.items(), PROGRAMS.items()
    ):
        try:
            theirs = _call(program(make(entry.reference)))
        except (TypeError, ValueError) as error:
            print(f"flax.nnx has no {entry.name}, {workload}, {name}: {str(error)[:80]}")
            continue
        timings = paired({"nnx": theirs, "ours": _call(program(make(entry.module)))}, seconds)
        rows.append(
            Row(
                **dataclasses.asdict(timings["ours"]),
                layer=entry.name,
                workload=workload,
                program=name,
            )
        )
        print(f"measured {rows[-1]}", flush=True)
    return rows


def _call(step: Step) -> Callable[[], Any]:
    compiled, arguments = step
    return lambda: compiled(*arguments)


if __name__ == "__main__":
    main()
