"""`python -m flax_customgrad bench` with PyTorch beside it, and with eight layers in a scan.

python -m benchmarks.layers [NAME ...] [--family FAMILY] [--seconds S]

    x       time of nnx divided by time of ours, median and quartiles: above 1 ours is faster
    torch   time of PyTorch divided by time of ours, where it is installed
    one     temporary memory of one layer, nnx's and ours
    scan    the same of eight layers in a lax.scan, which keeps the residuals of all

A layer without a counterpart in nnx is compared with autodiff of the same layer.
"""

import argparse

import jax

from benchmarks import pytorch
from flax_customgrad import catalogue
from flax_customgrad.command.benchmark.paired import pin_allocator
from flax_customgrad.command.benchmark.workloads import SLOWER, Pair, measure, scanned


def main() -> None:
    """Prints a line per workload, and at the end those in which ours is slower."""
    pin_allocator("benchmarks.layers")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="layers; all by default")
    parser.add_argument("--family", help="only the layers of this family")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each workload")
    args = parser.parse_args()
    names = [catalogue.find(name).name for name in args.names]
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{'':44} {'ours':>10}  {'x':16} {'torch':>6}  {'one, MB':>16}  {'scan, MB':>16}")
    slower = []
    for entry in catalogue.entries():
        if (names and entry.name not in names) or args.family not in (None, entry.family):
            continue
        for workload, make in entry.workloads.items():
            in_torch = pytorch.step(entry.name, make(entry.module))
            others = {} if in_torch is None else {"torch": in_torch}
            ours = measure(entry, workload, args.seconds, others)
            label = f"{entry.name}: {workload}"
            torch = f"{ours.others['torch'] / ours.milliseconds:6.2f}" if others else f"{'':6}"
            memory = (ours.temporary_bytes, scanned(entry, workload))
            print(
                f"{label:44} {ours.milliseconds:7.3f} ms  x{ours.ratio:.2f} "
                f"[{ours.low:.2f}, {ours.high:.2f}] {torch}  "
                + "  ".join(f"{_megabytes(pair):>16}" for pair in memory),
                flush=True,
            )
            if ours.ratio < SLOWER:
                slower.append(f"{label} x{ours.ratio:.2f}")
    print(f"\nslower than {SLOWER}: {'; '.join(slower) or 'none'}")


def _megabytes(pair: Pair) -> str:
    if pair.baseline is None or pair.ours is None:
        return ""
    return f"{pair.baseline / 1e6:.1f} -> {pair.ours / 1e6:.1f}"


if __name__ == "__main__":
    main()
