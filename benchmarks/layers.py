"""Every drop-in against the layer of nnx that it stands in for: value and gradient, compiled.

python -m benchmarks.layers [NAME ...] [--seconds S]
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.paired import paired, pin_allocator
from flax_customgrad import catalogue


def step(made: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A compiled value and gradient of an example for its parameters and inputs, and arguments."""
    is_layer = isinstance(made[0], nnx.Module)
    call, layer, *inputs = (lambda m, *x: m(*x), *made) if is_layer else made
    graphdef, params = nnx.split(layer)
    floats = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(params, *inputs_and_g):
        *inputs, g = inputs_and_g
        return jnp.vdot(call(nnx.merge(graphdef, params), *inputs), g).astype(jnp.float32)

    out = jax.eval_shape(call, layer, *inputs)
    g = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    wrt = (0, *(1 + i for i in floats))
    return jax.jit(jax.value_and_grad(loss, wrt)), (params, *inputs, g)


def main() -> None:
    """Prints one line per workload."""
    pin_allocator("benchmarks.layers")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=float, default=4.0)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; x: time of nnx / time of ours")
    for entry in catalogue.entries():
        if not entry.is_drop_in or (args.names and entry.name not in args.names):
            continue
        for workload, make in entry.workloads.items():
            functions, temps = {}, []
            for cls in (entry.reference, entry.module):
                fn, arguments = step(make(cls))
                compiled = fn.lower(*arguments).compile()
                temps.append(compiled.memory_analysis().temp_size_in_bytes / 1e6)
                functions[cls.__module__] = lambda f=compiled, a=arguments: f(*a)
            ours = list(paired(functions, args.seconds).values())[-1]
            memory = f"temp {temps[0]:.1f} -> {temps[1]:.1f} MB"
            print(f"{entry.name:14} {workload:28} {ours}  {memory}", flush=True)


if __name__ == "__main__":
    main()
