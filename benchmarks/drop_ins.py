"""Drop-ins beside flax.nnx in what `bench` leaves out: the output alone, and bfloat16.

python -m benchmarks.drop_ins [NAME ...] [--family FAMILY] [--seconds S] [--json FILE]

    forward           the output, jitted, in the dtype of the workload
    forward, bf16     parameters and inputs in bfloat16
    step, bf16        value and gradient of that
    x                 nnx's time divided by ours, median and quartiles of paired rounds

The workloads are those of the catalogue. What loses comes first.
"""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad import catalogue
from flax_customgrad.command import measurements
from flax_customgrad.command.benchmark.paired import paired, pin_allocator
from flax_customgrad.command.benchmark.steps import forward, in_dtype, step
from flax_customgrad.command.benchmark.workloads import SLOWER
from flax_customgrad.registry.entry import Entry


@dataclass(frozen=True)
class Row:
    """One program of a workload, against that of nnx.

    Attributes:
        layer: the name of the layer.
        workload: the name of the workload.
        program: one of `PROGRAMS`.
        milliseconds: the median time of ours.
        ratio: the median of nnx's time divided by ours.
        low: the lower quartile of that ratio.
        high: the upper quartile.
    """

    layer: str
    workload: str
    program: str
    milliseconds: float
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        label = f"{self.layer}: {self.workload}, {self.program}"
        ratio = f"x{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]"
        return f"{label:64} {self.milliseconds:8.3f} ms  {ratio}"


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
    parser.add_argument("names", nargs="*", help="layers; all drop-ins by default")
    parser.add_argument("--family", help="only the layers of this family")
    parser.add_argument("--seconds", type=float, default=1.5, help="time spent on each program")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to save the rows")
    args = parser.parse_args()
    names = [catalogue.find(name).name for name in args.names]
    rows: list[Row] = []
    for entry in catalogue.entries():
        is_asked = not names or entry.name in names
        if entry.is_drop_in and is_asked and args.family in (None, entry.family):
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
    for workload, make in entry.workloads.items():
        for name, program in PROGRAMS.items():
            calls = {}
            for module in (entry.reference, entry.module):
                try:
                    compiled, arguments = program(make(module))
                except (TypeError, ValueError) as error:  # what nnx does not have in half precision
                    print(f"left out: {entry.name}, {workload}, {name}: {str(error)[:80]}")
                    break
                calls[module] = lambda f=compiled, a=arguments: f(*a)
            else:
                ours = paired(calls, seconds)[entry.module]
                rows.append(
                    Row(
                        entry.name,
                        workload,
                        name,
                        ours.milliseconds,
                        ours.ratio,
                        ours.low,
                        ours.high,
                    )
                )
                print(f"measured {rows[-1]}", flush=True)
    return rows


if __name__ == "__main__":
    main()
