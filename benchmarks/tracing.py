"""What tracing, lowering and eager calls of a model cost: 48 Linear layers, plain and converted.

python -m benchmarks.tracing [--rounds N]
"""

import argparse
import gc

import jax
import jax.numpy as jnp
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.command.benchmark.paired import paired, pin_allocator


class MLP(nnx.Module):
    """Linear layers of width 64 with relu between them."""

    def __init__(self, depth: int, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layers to `x`, of shape (batch, 64)."""
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


def gradient(model: MLP, x: jax.Array) -> nnx.State:
    """The gradient of a mean of squares."""
    return nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)


def trace_and_lower(model: MLP, x: jax.Array) -> None:
    """Traces and lowers the gradient; JAX has nothing of it in its caches."""
    gc.collect()
    nnx.jit(lambda model, x: gradient(model, x)).lower(model, x)


def main() -> None:
    """Prints one line per kind of call."""
    pin_allocator("benchmarks.tracing")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    x = jnp.ones((8, 64))
    plain, ours = MLP(48, nnx.Rngs(0)), fcg.convert(MLP(48, nnx.Rngs(0)))
    print(f"jax {jax.__version__}; x: time of nnx / time of ours")
    calls = {
        "trace and lower": trace_and_lower,
        "eager forward": lambda model, x: model(x),
        "eager gradient": lambda model, x: jax.tree.leaves(gradient(model, x)),
    }
    for name, call in calls.items():
        functions = {"nnx": lambda c=call: c(plain, x), "ours": lambda c=call: c(ours, x)}
        timing = paired(functions, seconds=0, rounds=rounds)["ours"]
        print(f"{name:16} {timing}  ({1 / timing.ratio:.2f} of nnx's time)", flush=True)


if __name__ == "__main__":
    main()
