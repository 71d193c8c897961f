"""Products in int8 against float32, and beside qwix and AQT where they are installed.

python -m benchmarks.int8 [--seconds S] [--only TEXT] [--tiny]

    x      time of float32, by `Linear` or `Conv`, divided by time of the row; median and quartiles

`forward` is the output of one layer, `step` the value and the gradient of sum(y * g) for its
parameters and its input. The shapes go from small ones, where rounding takes longer than it saves,
to large ones. qwix and AQT round as their names say: in the forward alone, or in both passes.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.command.benchmark.paired import paired, pin_allocator
from flax_customgrad.command.benchmark.steps import step

LINEAR = (
    (32, 64, 64),
    (256, 256, 256),
    (32, 1024, 1024),
    (1024, 256, 1024),
    (4096, 1024, 1024),
    (2048, 4096, 1024),
)
"""Rows, features of the input, features of the output."""

CONV: tuple[tuple[tuple[int, ...], int, int, dict[str, Any]], ...] = (
    ((8, 32, 32, 3), 32, 3, {}),
    ((8, 28, 28, 16), 16, 3, {}),
    ((8, 28, 28, 64), 64, 3, {}),
    ((8, 28, 28, 64), 128, 3, {"strides": 2}),
    ((8, 28, 28, 128), 128, 1, {}),
    ((8, 28, 28, 64), 64, 3, {"feature_group_count": 8}),
    ((8, 28, 28, 64), 64, 3, {"feature_group_count": 64}),
)
"""Shape of the images, features of the output, window, and arguments."""

Make = Callable[[], nnx.Module]
Case = tuple[str, Callable[[], jax.Array], dict[str, Make]]

BACKWARDS = ("int8, float backward", "int8, int8 backward", "int8, switchback backward")


def main() -> None:
    """Prints a table per shape."""
    pin_allocator("benchmarks.int8")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="time spent on each table")
    parser.add_argument("--only", default="", help="only shapes whose name has this in it")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: to see that it runs")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for name, inputs, layers in (*linear_cases(args.tiny), *conv_cases(args.tiny)):
        if args.only not in name:
            continue
        x = inputs()
        for kind, compiled in (("forward", forward), ("step", training_step)):
            # The backwards differ in the step alone.
            rows = [row for row in layers if kind == "step" or row not in BACKWARDS[1:]]
            steps = {row: compiled(layers[row], x) for row in rows}
            print(f"\n{name}, {kind}")
            for row, timing in paired(steps, args.seconds, rounds=7).items():
                print(f"  {row:28} {timing}", flush=True)


def linear_cases(tiny: bool) -> Iterator[Case]:
    """Linear layers, by shape."""
    for rows, features, out in ((8, 16, 4),) if tiny else LINEAR:
        rngs = {"rngs": nnx.Rngs(0)}
        layers: dict[str, Make] = {
            "float32": functools.partial(fcg.Linear, features, out, **rngs),
            **{
                row: functools.partial(
                    fcg.Int8Linear, features, out, backward=row.split()[1], **rngs
                )
                for row in BACKWARDS
            },
        }
        for name, dot_general in {**_of_qwix(), **_of_aqt()}.items():
            layers[name] = functools.partial(
                nnx.Linear, features, out, dot_general=dot_general, **rngs
            )
        yield f"{rows}x{features} to {out}", functools.partial(_normal, rows, features), layers


def conv_cases(tiny: bool) -> Iterator[Case]:
    """Convolutions, by shape."""
    for shape, out, window, kwargs in (((2, 8, 8, 4), 4, 3, {}),) if tiny else CONV:
        args = (shape[-1], out, (window, window))
        kwargs = {**kwargs, "rngs": nnx.Rngs(0)}
        layers: dict[str, Make] = {
            "float32": functools.partial(fcg.Conv, *args, **kwargs),
            **{
                row: functools.partial(fcg.Int8Conv, *args, backward=row.split()[1], **kwargs)
                for row in BACKWARDS
            },
        }
        # The gradients of qwix's grouped convolutions fail.
        for name, conv in (_conv_of_qwix() if "feature_group_count" not in kwargs else {}).items():
            layers[name] = functools.partial(nnx.Conv, *args, conv_general_dilated=conv, **kwargs)
        options = "".join(f", {key} {value}" for key, value in kwargs.items() if key != "rngs")
        name = f"{'x'.join(map(str, shape))} to {out}, window {window}{options}"
        yield name, functools.partial(_normal, *shape), layers


def forward(make: Make, x: jax.Array) -> Callable[[], Any]:
    """The compiled output of a layer."""
    graphdef, state = nnx.split(make())
    compiled = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, x).compile()
    return lambda: compiled(state, x)


def training_step(make: Make, x: jax.Array) -> Callable[[], Any]:
    """The compiled value and gradient of a layer."""
    compiled, args = step((make(), x))
    return lambda: compiled(*args)


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def _of_qwix() -> dict[str, Callable[..., Any]]:
    """The products of qwix; none where it is not installed."""
    try:
        from qwix._src.core import dot_general_qt
    except ImportError:
        return {}
    int8 = {"lhs_qtype": jnp.int8, "rhs_qtype": jnp.int8}
    both = {"dlhs_grad_qtype": jnp.int8, "drhs_grad_qtype": jnp.int8}

    def product(config: Any, lhs: Any, rhs: Any, numbers: Any, **ignored: Any) -> Any:
        return dot_general_qt.dot_general_qt(lhs, rhs, numbers, config)

    configs = {
        "qwix, forward": dot_general_qt.DotGeneralQtConfig(**int8, use_original_residuals=True),
        "qwix, both": dot_general_qt.DotGeneralQtConfig(**int8, **both),
    }
    return {name: functools.partial(product, config) for name, config in configs.items()}


def _conv_of_qwix() -> dict[str, Callable[..., Any]]:
    """The convolutions of qwix; none where it is not installed."""
    try:
        from qwix._src.core import conv_general_qt
    except ImportError:
        return {}
    int8 = {"lhs_qtype": jnp.int8, "rhs_qtype": jnp.int8}
    both = {"dlhs_grad_qtype": jnp.int8, "drhs_grad_qtype": jnp.int8}

    def convolution(
        config: Any, lhs: Any, rhs: Any, strides: Any, padding: Any, **geometry: Any
    ) -> Any:
        return conv_general_qt.conv_general_qt(
            lhs,
            rhs,
            config,
            strides,
            padding,
            geometry["lhs_dilation"],
            geometry["rhs_dilation"],
            geometry["dimension_numbers"],
        )

    configs = {
        "qwix, forward": conv_general_qt.ConvGeneralQtConfig(**int8),
        "qwix, both": conv_general_qt.ConvGeneralQtConfig(**int8, **both),
    }
    return {name: functools.partial(convolution, config) for name, config in configs.items()}


def _of_aqt() -> dict[str, Callable[..., Any]]:
    """The products of AQT; none where it is not installed."""
    try:
        from aqt.jax.v2 import config
    except ImportError:
        return {}

    def product(dot_general: Any, lhs: Any, rhs: Any, numbers: Any, **ignored: Any) -> Any:
        return dot_general(lhs, rhs, numbers)

    configs = {
        "AQT, forward": config.fully_quantized(bwd_bits=None, use_stochastic_rounding=False),
        "AQT, both": config.fully_quantized(use_stochastic_rounding=False),
    }
    return {name: functools.partial(product, dot) for name, dot in configs.items()}


if __name__ == "__main__":
    main()
