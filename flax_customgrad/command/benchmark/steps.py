"""What is measured of a catalogue example: value and gradient, output alone, a stack of layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.autodiff import use_autodiff
from flax_customgrad.contract.residuals import residual_bytes

Example = tuple[Any, ...]
"""What a maker of the catalogue returns: a layer or function, and its inputs."""

Step = tuple[Any, tuple[Any, ...]]


def variants(entry: Any, make: Any) -> dict[str, Callable[[], Step]]:
    """Makers of compiled steps: first that of the baseline, then that of ours.

    Args:
        entry: a catalogue entry.
        make: one of its workloads. The baseline is the reference in nnx, or autodiff of the same
            layer where there is none.
    """
    if entry.is_drop_in:
        return {
            "nnx": lambda: step(make(entry.reference)),
            "ours": lambda: step(make(entry.module)),
        }

    def by_autodiff() -> Step:
        with use_autodiff():
            return step(make(entry.module))

    return {"autodiff": by_autodiff, "ours": lambda: step(make(entry.module))}


def step(example: Example) -> Step:
    """The compiled value and gradient of an example for parameters and inputs; its arguments.

    The value is the output of the layer, not a sum over it, which XLA would compute in one pass
    with some layers and not with others.
    """
    call, state, inputs = _split(example)
    floats = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    out = jax.eval_shape(call, state, *inputs)
    g = jax.random.normal(jax.random.key(1), out.shape, out.dtype)

    def value_and_gradient(state, *inputs_and_g):
        *inputs, g = inputs_and_g

        def output(state, *differentiated):
            for i, x in zip(floats, differentiated, strict=True):
                inputs[i] = x
            return call(state, *inputs)

        y, pull_back = jax.vjp(output, state, *(inputs[i] for i in floats))
        return y, pull_back(g)

    args = (state, *inputs, g)
    return jax.jit(value_and_gradient).lower(*args).compile(), args


def forward(example: Example) -> Step:
    """The compiled output of an example, and its arguments."""
    call, state, inputs = _split(example)
    args = (state, *inputs)
    return jax.jit(call).lower(*args).compile(), args


def in_dtype(example: Example, dtype: Any) -> Example:
    """An example whose floating parameters and inputs have another dtype.

    Args:
        example: a layer or function, and its inputs; a layer is changed in place.
        dtype: the dtype.
    """

    def cast(a: Any) -> Any:
        if isinstance(a, nnx.Module):
            nnx.update(a, jax.tree.map(cast, nnx.state(a)))
            return a
        is_floating = hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)
        return a.astype(dtype) if is_floating else a

    return tuple(map(cast, example))


def kept_bytes(example: Example) -> int:
    """The bytes that the backward of an example keeps beyond its parameters and inputs.

    Args:
        example: a layer or function, and its inputs.
    """
    call, state, inputs = _split(example)
    return residual_bytes(call, state, *inputs)


def scan_bytes(example: Example, layers: int = 8) -> int | None:
    """Bytes of temporary memory of the gradient of layers in a scan.

    Args:
        example: an example; each layer passes its output on as the first input of the next.
        layers: how many layers.

    Returns:
        The bytes; None if an output does not have the shape of that input.
    """
    call, state, (x, *rest) = _split(example)
    if jax.eval_shape(call, state, x, *rest).shape != x.shape:
        return None
    stacked = jax.tree.map(lambda v: jnp.stack([v] * layers), state)

    def loss(stacked, x, *rest):
        def body(carry, state):
            return call(state, carry, *rest).astype(carry.dtype), None

        y, _ = jax.lax.scan(body, x, stacked, length=layers)
        return jnp.sum(y.astype(jnp.float32))

    wrt = tuple(range(0 if jax.tree.leaves(state) else 1, 2 + len(rest)))
    compiled = jax.jit(jax.value_and_grad(loss, wrt)).lower(stacked, x, *rest).compile()
    return compiled.memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]


def _split(example: Example) -> tuple[Any, Any, tuple[Any, ...]]:
    """A function of (state, *inputs), the state, and the inputs."""
    first, *rest = example
    if not all(hasattr(x, "dtype") for x in rest if not isinstance(x, nnx.Module)):
        arrays = [x for x in rest if hasattr(x, "dtype")]
        return (lambda _, *inputs: first(*inputs, *rest[len(arrays) :])), {}, tuple(arrays)
    if not isinstance(first, nnx.Module) and not (rest and isinstance(rest[0], nnx.Module)):
        return (lambda _, *inputs: first(*inputs)), {}, tuple(rest)
    if isinstance(first, nnx.Module):
        run, layer, inputs = (lambda m, *x: m(*x)), first, rest
    else:
        run, (layer, *inputs) = first, rest
    graphdef, params, fixed = nnx.split(layer, nnx.Param, ...)

    def call(params, *inputs):
        return run(nnx.merge(graphdef, params, fixed, copy=True), *inputs)

    return call, params, tuple(inputs)
