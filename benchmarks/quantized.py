"""A training step in few bits, beside float32 and, where they are installed, qwix and AQT.

python -m benchmarks.quantized [--features N] [--rows N] [--layers N] [--seconds S] [--bits 8 4]

    x      time of the same network in float32 divided by this one's, median and quartiles
    kept   bytes that the backward of one layer keeps beyond its arguments, as JAX lists them
    temp   what XLA sets aside for a step in which a scan goes through the layers

Then the packed network is served: called alone, with a scale of the input that was recorded, for
one row, for 64, and for all.

A step is the value and the gradient of sum(network(x) * g) for the parameters and x. The network is
one of square linear layers with a rectifier behind each; every system fake-quantizes kernels, one
scale for each output, and inputs, one scale for all, and multiplies in float32 or int8 as it
chooses. qwix and AQT multiply in int8.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import flax_customgrad as fcg
from flax_customgrad.command.benchmark.paired import paired, pin_allocator

Build = Callable[[int], Callable[[nnx.Rngs], Any]]


def main() -> None:
    """Prints a line per system."""
    pin_allocator("benchmarks.quantized")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4])
    args = parser.parse_args()
    print(
        f"{args.layers} layers of {args.features}, {args.rows} rows; jax {jax.__version__}",
        flush=True,
    )
    for bits in args.bits:
        found = dict(systems(args.features, bits))
        steps = {name: step(make, args) for name, make in found.items()}
        times = paired(steps, args.seconds, rounds=5)
        print(f"W{bits}A{bits}")
        for name, make in found.items():
            kept, temp = (f"{n / 1e6:8.2f} MB" for n in memory(make, args))
            print(f"  {name:34} {times[name]}  kept {kept}  temp {temp}", flush=True)
    for rows in sorted({1, 64, args.rows}):
        print(f"served, {rows} rows")
        served = {"float32": serve(next(systems(args.features, 8))[1], args, rows)}
        for bits in args.bits:
            make = partial(_static, args.features, bits)
            served[f"packed, W{bits}A8"] = serve(make, args, rows)
        for name, timing in paired(served, args.seconds / 10, rounds=7).items():
            print(f"  {name:34} {timing}", flush=True)


def systems(features: int, bits: int) -> Iterator[tuple[str, Callable[[nnx.Rngs], Any]]]:
    """Makers of one linear layer, by name; the first is in float32."""

    def plain(rngs: nnx.Rngs, **kwargs: Any) -> nnx.Linear:
        return nnx.Linear(features, features, rngs=rngs, **kwargs)

    yield "float32", plain
    for residuals in ("quantized", "original"):
        yield (
            f"QuantLinear, residuals {residuals}",
            lambda rngs, residuals=residuals: fcg.QuantLinear(
                features,
                features,
                weight=fcg.FakeQuant(bits, axis=-1),
                activation=fcg.FakeQuant(bits),
                residuals=residuals,  # pyright: ignore[reportArgumentType]
                rngs=rngs,
            ),
        )
    if bits == 8:
        for backward in ("float", "int8", "switchback"):
            yield (
                f"Int8Linear, backward {backward}",
                lambda rngs, backward=backward: fcg.Int8Linear(
                    features, features, backward=backward, rngs=rngs
                ),
            )
    if bits == 8 and importlib.util.find_spec("qwix") is not None:
        # XLA on a CPU has no products of int4, on which qwix insists.
        yield "qwix QAT", lambda rngs: _qwix(plain(rngs), bits, None)
        yield "qwix QT", lambda rngs: _qwix(plain(rngs), bits, f"int{bits}")
    if importlib.util.find_spec("aqt") is not None:
        yield "AQT", lambda rngs: plain(rngs, dot_general=_aqt(bits, None))
        yield "AQT, backward too", lambda rngs: plain(rngs, dot_general=_aqt(bits, bits))


def _qwix(layer: nnx.Linear, bits: int, backward: str | None) -> Any:
    import qwix  # pyright: ignore[reportMissingImports]

    rule = qwix.QtRule(
        module_path=".*",
        weight_qtype=f"int{bits}",
        act_qtype=f"int{bits}",
        bwd_qtype=backward,
    )
    return qwix.quantize_model(layer, qwix.QtProvider([rule]), jnp.ones((2, layer.in_features)))


def _aqt(bits: int, backward: int | None) -> Callable[..., jax.Array]:
    from aqt.jax.v2 import config  # pyright: ignore[reportMissingImports]

    quantized = config.fully_quantized(
        fwd_bits=bits, bwd_bits=backward, use_stochastic_rounding=False
    )
    # nnx passes a sharding, which AQT does not know.
    return lambda *operands, out_sharding=None, **kwargs: quantized(*operands, **kwargs)


def step(make: Callable[[nnx.Rngs], Any], args: argparse.Namespace) -> Callable[[], Any]:
    """A compiled step of the network."""
    rngs = nnx.Rngs(0)
    layers = nnx.List([make(rngs) for _ in range(args.layers)])
    graphdef, params, rest = nnx.split(layers, nnx.Param, ...)
    x, g = (
        jax.random.normal(jax.random.key(seed), (args.rows, args.features)) for seed in range(2)
    )

    def loss(params: nnx.State, x: jax.Array) -> jax.Array:
        for layer in nnx.merge(graphdef, params, rest, copy=True):
            x = jax.nn.relu(layer(x))
        return jnp.vdot(x, g)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x).compile()
    return lambda: compiled(params, x)


def _static(features: int, bits: int, rngs: nnx.Rngs) -> fcg.QuantLinear:
    """A packed layer that measures no scale."""
    activation = fcg.FakeQuant(8, dynamic=False)
    activation.observe(jnp.array([3.0]))
    weight = fcg.FakeQuant(bits, axis=-1)
    layer = fcg.QuantLinear(features, features, weight=weight, activation=activation, rngs=rngs)
    return fcg.pack(layer)


def serve(
    make: Callable[[nnx.Rngs], Any], args: argparse.Namespace, rows: int
) -> Callable[[], Any]:
    """A compiled call of the network."""
    rngs = nnx.Rngs(0)
    graphdef, state = nnx.split(nnx.List([make(rngs) for _ in range(args.layers)]))
    x = jax.random.normal(jax.random.key(0), (rows, args.features))

    def apply(state: nnx.State, x: jax.Array) -> jax.Array:
        for layer in nnx.merge(graphdef, state):
            x = jax.nn.relu(layer(x))
        return x

    compiled = jax.jit(apply).lower(state, x).compile()
    return lambda: compiled(state, x)


def memory(make: Callable[[nnx.Rngs], Any], args: argparse.Namespace) -> tuple[int, int]:
    """Bytes kept for the backward of a layer, and set aside for a scan over layers."""
    x = jnp.ones((args.rows, args.features))
    layer = make(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def apply(params: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    stacked = jax.tree.map(lambda a: jnp.stack([a] * 8), params)

    def deep(stacked: nnx.State, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, params: (apply(params, x), None), x, stacked)[0].sum()

    compiled = jax.jit(jax.grad(deep)).lower(stacked, x).compile()
    found = compiled.memory_analysis()
    assert found is not None
    return fcg.residual_bytes(apply, params, x), found.temp_size_in_bytes


if __name__ == "__main__":
    main()
