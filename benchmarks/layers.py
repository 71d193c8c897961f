"""Every layer against that of nnx, and where it is installed PyTorch: value and gradient, compiled.

python -m benchmarks.layers [NAME ...] [--family FAMILY] [--seconds S]

    x       time of nnx divided by time of ours, median and quartiles: above 1 ours is faster
    torch   time of PyTorch divided by time of ours
    one     temporary memory of one layer, nnx's and ours
    scan    the same of eight layers in a lax.scan, which keeps the residuals of all

A layer without a counterpart in nnx is compared with autodiff of the same layer.
"""

import argparse

import jax

from benchmarks import pytorch
from benchmarks.paired import paired, pin_allocator
from benchmarks.steps import scan_bytes, variants
from flax_customgrad import catalogue, use_autodiff


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
            line, ratio = compare(entry, make, args.seconds)
            label = f"{entry.name}: {workload}"
            print(f"{label:44} {line}", flush=True)
            if ratio < 0.97:
                slower.append(f"{label} x{ratio:.2f}")
    print(f"\nslower than 0.97: {'; '.join(slower) or 'none'}")


def compare(entry: catalogue.Entry, make: catalogue.Example, seconds: float) -> tuple[str, float]:
    """A line for one workload, and the ratio in it.

    Args:
        entry: the layer.
        make: the workload.
        seconds: how long to measure.
    """
    functions, temps = {}, []
    for name, compile_step in variants(entry, make).items():
        compiled, args = compile_step()
        temps.append(compiled.memory_analysis().temp_size_in_bytes)
        functions[name] = lambda f=compiled, a=args: f(*a)
    in_torch = pytorch.step(entry.name, make(entry.module))
    if in_torch is not None:
        functions["torch"] = in_torch
    timed = paired(functions, seconds)
    ours = timed["ours"]
    torch = f"{timed['torch'].milliseconds / ours.milliseconds:6.2f}" if in_torch else f"{'':6}"
    scans = [scan_bytes(make(entry.reference or entry.module)), scan_bytes(make(entry.module))]
    if not entry.is_drop_in:
        with use_autodiff():
            scans[0] = scan_bytes(make(entry.module))
    memory = "  ".join(f"{_megabytes(pair):>16}" for pair in (temps, scans))
    times = f"{ours.milliseconds:7.3f} ms  x{ours.ratio:.2f} [{ours.low:.2f}, {ours.high:.2f}]"
    return f"{times} {torch}  {memory}", ours.ratio


def _megabytes(pair: list[int | None]) -> str:
    return "" if None in pair else " -> ".join(f"{n / 1e6:.1f}" for n in pair if n is not None)


if __name__ == "__main__":
    main()
