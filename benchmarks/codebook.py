"""A training step of VectorQuantizer against vector-quantize-pytorch, where that is installed.

python -m benchmarks.codebook [--codes N] [--features N] [--vectors N] [--seconds S]

    x      time of vector-quantize-pytorch divided by time of ours, median and quartiles
    peak   how much the process grows by its first three steps, each library in one of its own

A step is the value and gradient of sum(values * g) + loss: for z and the codes where the codebook
is learned by loss; for z, with the update of the codebook, where it is a moving average.
"""

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.command.benchmark.paired import paired, pin_allocator

VARIANTS = {
    "loss, straight-through": ("loss", "straight_through"),
    "loss, rotation": ("loss", "rotation"),
    "ema, straight-through": ("ema", "straight_through"),
    "ema, rotation": ("ema", "rotation"),
}


def main() -> None:
    """Prints a line per variant."""
    pin_allocator("benchmarks.codebook")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--vectors", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=30.0, help="time spent on each variant")
    parser.add_argument("--peak-of", nargs=2, metavar=("LIBRARY", "VARIANT"), help="print bytes")
    args = parser.parse_args()
    if args.peak_of:
        library, variant = args.peak_of
        print(memory_growth(lambda: LIBRARIES[library](variant, args)))
        return
    print(f"{args.codes} codes of {args.features}, {args.vectors} vectors; jax {jax.__version__}")
    for variant in VARIANTS:
        print(f"{variant:24} {compare(variant, args)}", flush=True)


def compare(variant: str, args: argparse.Namespace) -> str:
    """A line: the times of both, and how much memory each took."""
    steps = {"torch": pytorch(variant, args), "ours": ours(variant, args)}
    available = {name: step for name, step in steps.items() if step is not None}
    timed = paired(available, args.seconds, rounds=5)
    grown = {name: _growth_in_own_process(name, variant) for name in available}
    line = f"{timed['ours']}  peak {grown['ours'] / 1e6:.0f} MB"
    if "torch" not in available:
        return line
    ratio = grown["torch"] / max(1, grown["ours"])
    return f"{line}  torch {timed['torch'].milliseconds:.0f} ms, {ratio:.0f} times the memory"


def ours(variant: str, args: argparse.Namespace) -> Callable[[], Any]:
    """A compiled step; it returns gradients and, of a moving average, the new state."""
    learning, gradient = VARIANTS[variant]
    layer = fcg.VectorQuantizer(
        args.codes, args.features, learning=learning, gradient=gradient, rngs=nnx.Rngs(0)
    )
    graphdef, params, state = nnx.split(layer, nnx.Param, ...)
    z, g = map(jnp.asarray, _data(args))

    def step(params: nnx.State, state: nnx.State, z: jax.Array, g: jax.Array) -> Any:
        def total(params: nnx.State, z: jax.Array) -> Any:
            layer = nnx.merge(graphdef, params, state, copy=True)
            out = layer(z)
            return jnp.vdot(out.values, g) + out.loss, nnx.state(layer, nnx.Not(nnx.Param))

        return jax.grad(total, (0, 1), has_aux=True)(params, z)

    compiled = jax.jit(step).lower(params, state, z, g).compile()
    return lambda: compiled(params, state, z, g)


def pytorch(variant: str, args: argparse.Namespace) -> Callable[[], Any] | None:
    """The same with vector-quantize-pytorch, eagerly; None where it is not installed."""
    try:
        import torch
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        return None
    torch.set_num_threads(2)
    learning, gradient = VARIANTS[variant]
    layer = VectorQuantize(
        args.features,
        args.codes,
        decay=0.99,
        commitment_weight=0.25,
        rotation_trick=gradient == "rotation",
        learnable_codebook=learning == "loss",
        ema_update=learning == "ema",
    )
    z, g = (torch.from_numpy(a)[None] for a in _data(args))
    leaves = [z.requires_grad_(), *layer.parameters()]

    def step() -> Any:
        for leaf in leaves:
            leaf.grad = None
        values, _, loss = layer(z)
        ((values * g).sum() + loss.sum()).backward()
        return z.grad

    return step


LIBRARIES = {"ours": ours, "torch": pytorch}


def memory_growth(make: Callable[[], Callable[[], Any]]) -> int:
    """The largest number of bytes by which this process grows during three steps."""
    step = make()
    before, done = _resident_bytes(), threading.Event()
    sizes: list[int] = []

    def watch() -> None:
        while not done.wait(0.002):
            sizes.append(_resident_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    for _ in range(3):
        jax.block_until_ready(step())
    done.set()
    watching.join()
    return max(sizes, default=before) - before


def _resident_bytes() -> int:
    """How many bytes of memory this process has, on Linux."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _growth_in_own_process(library: str, variant: str) -> int:
    command = [sys.executable, "-m", "benchmarks.codebook", *sys.argv[1:]]
    out = subprocess.run(
        [*command, "--peak-of", library, variant], check=True, capture_output=True, text=True
    )
    return int(out.stdout.split()[-1])


def _data(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (args.vectors, args.features)
    return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)


if __name__ == "__main__":
    main()
