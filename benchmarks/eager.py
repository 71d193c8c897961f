"""What a layer costs outside of `jax.jit`, where Python takes longer than the arithmetic.

taskset -c 0 python -m benchmarks.eager [--rounds N]

A forward of each layer, and the gradient of a small network, on arrays so small that only the calls
count. Printed is the processor's time of one call, the least of many rounds in turn with nnx, and
ours divided by nnx's. On one core (`taskset`) XLA's threads do not wait for each other.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.command.benchmark.paired import pin_allocator

CALLS = 20
"""How many calls of one round; the clock of a process is coarse."""


class MLP(nnx.Module):
    """Four Linear layers with LayerNorm and gelu between them."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(4)])
        self.norm = nnx.List([nnx.LayerNorm(16, rngs=rngs) for _ in range(4)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layers to `x`, of shape (batch, 16)."""
        for linear, norm in zip(self.linear, self.norm, strict=True):
            x = nnx.gelu(norm(linear(x)))
        return x


def cases() -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """The name of each case, a call of nnx, and the same of ours."""
    x, images, rngs = jnp.ones((8, 16)), jnp.ones((2, 8, 8, 4)), nnx.Rngs(0)
    layers = {
        "LayerNorm": (nnx.LayerNorm(16, rngs=rngs), x),
        "RMSNorm": (nnx.RMSNorm(16, rngs=rngs), x),
        "BatchNorm": (nnx.BatchNorm(16, rngs=rngs), x),
        "Linear": (nnx.Linear(16, 16, rngs=rngs), x),
        "Conv": (nnx.Conv(4, 4, (3, 3), rngs=rngs), images),
    }
    for name, (layer, array) in layers.items():
        converted = fcg.convert(nnx.clone(layer))
        yield name, lambda f=layer, a=array: f(a), lambda f=converted, a=array: f(a)
    for name in ("gelu", "relu", "softmax"):
        theirs, ours = getattr(nnx, name), getattr(fcg, name)
        yield name, lambda f=theirs: f(x), lambda f=ours: f(x)
    model = MLP(rngs)
    converted = fcg.convert(nnx.clone(model))

    def gradient(model: MLP) -> Any:
        return jax.tree.leaves(nnx.grad(lambda model: jnp.sum(model(x)))(model))

    yield "gradient of an MLP", lambda: gradient(model), lambda: gradient(converted)


def main() -> None:
    """Prints a line per case, the dearest first."""
    pin_allocator("benchmarks.eager")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    print(f"jax {jax.__version__}; microseconds of the processor for a call")
    print(f"{'':20} {'nnx':>9} {'ours':>9}  ours / nnx")
    measured = [(name, *least([theirs, ours], rounds)) for name, theirs, ours in cases()]
    for name, theirs, ours in sorted(measured, key=lambda row: row[1] / row[2]):
        print(f"{name:20} {theirs:9.0f} {ours:9.0f}  {ours / theirs:.2f}")


def least(functions: list[Callable[[], Any]], rounds: int) -> list[float]:
    """The processor's time of a call of each function, in microseconds: the least of all rounds.

    Args:
        functions: the functions, called in turn.
        rounds: how many rounds.
    """
    times = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            jax.block_until_ready(function())
            began = time.process_time()
            for _ in range(CALLS):
                out = function()
            jax.block_until_ready(out)
            times[i] = min(times[i], 1e6 * (time.process_time() - began) / CALLS)
    return times


if __name__ == "__main__":
    main()
