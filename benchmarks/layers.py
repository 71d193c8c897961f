"""`python -m flax_customgrad bench` with PyTorch beside it, and with eight layers in a scan.

python -m benchmarks.layers [NAME ...] [--family FAMILY] [--seconds S] [--rounds N] [--torch]
                            [--json FILE]

    x       time of nnx divided by time of ours, median and quartiles: above 1 ours is faster
    torch   time of PyTorch, eager and in the better of its layouts, divided by time of ours
    one     temporary memory of one layer, nnx's and ours
    scan    the same of eight layers in a lax.scan, which keeps the residuals of all

A layer without a counterpart in nnx is compared with autodiff of the same layer. PyTorch is timed
where it is installed and has the layer; --torch leaves out the others, and the scan.
"""

import argparse
import dataclasses
from pathlib import Path

import jax

from benchmarks import pytorch
from flax_customgrad import catalogue
from flax_customgrad.command import measurements
from flax_customgrad.command.benchmark.paired import pin_allocator
from flax_customgrad.command.benchmark.workloads import (
    SLOWER,
    Measurement,
    Pair,
    measure,
    scanned,
)


def main() -> None:
    """Prints a line per workload, and at the end those in which ours is slower."""
    pin_allocator("benchmarks.layers")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="layers; all by default")
    parser.add_argument("--family", help="only the layers of this family")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each workload")
    parser.add_argument("--rounds", type=int, default=9, help="how often to call each at least")
    parser.add_argument("--torch", action="store_true", help="only what PyTorch has too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to save the rows")
    args = parser.parse_args()
    names = [catalogue.find(name).name for name in args.names]
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{'':44} {'ours':>10}  {'x':16} {'torch':>6}  {'one, MB':>16}  {'scan, MB':>16}")
    rows = []
    for entry in catalogue.entries():
        if (names and entry.name not in names) or args.family not in (None, entry.family):
            continue
        for workload, make in entry.workloads.items():
            in_torch = pytorch.steps(entry.name, make(entry.module))
            if args.torch and not in_torch:
                continue
            measured = measure(entry, workload, args.seconds, in_torch, args.rounds)
            memory = [measured.temporary_bytes]
            if not args.torch:
                memory.append(scanned(entry, workload))
            print(_line(measured, memory), flush=True)
            rows.append(measured)
    slower = [f"{_label(row)} x{row.ratio:.2f}" for row in rows if row.ratio < SLOWER]
    print(f"\nslower than {SLOWER}: {'; '.join(slower) or 'none'}")
    if args.json is not None:
        packages = ("torch",) if any(row.others for row in rows) else ()
        measurements.write(args.json, map(dataclasses.asdict, rows), packages)


def _line(row: Measurement, memory: list[Pair]) -> str:
    torch = f"{min(row.others.values()) / row.milliseconds:6.2f}" if row.others else f"{'':6}"
    return (
        f"{_label(row):44} {row.milliseconds:7.3f} ms  x{row.ratio:.2f} "
        f"[{row.low:.2f}, {row.high:.2f}] {torch}  "
        + "  ".join(f"{_megabytes(pair):>16}" for pair in memory)
    )


def _label(row: Measurement) -> str:
    return f"{row.layer}: {row.workload}"


def _megabytes(pair: Pair) -> str:
    if pair.baseline is None or pair.ours is None:
        return ""
    return f"{pair.baseline / 1e6:.1f} -> {pair.ours / 1e6:.1f}"


if __name__ == "__main__":
    main()
