"""What the backwards of the catalogue keep, measured while they are traced: nothing is computed.

A workload is built, called and differentiated on shapes alone, which takes milliseconds where the
arrays themselves would take seconds and gigabytes.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad import catalogue, residual_bytes, use_autodiff


@dataclass(frozen=True)
class Kept:
    """What is kept for the backward of one workload, beyond the inputs and parameters.

    Attributes:
        workload: its name in the catalogue.
        inputs: bytes of the inputs.
        ours: bytes that the backward of this library keeps.
        by_autodiff: bytes that JAX keeps for the layer of nnx, or for this one where there is none;
            None for a surrogate, which autodiff does not differentiate.
    """

    workload: str
    inputs: int
    ours: int
    by_autodiff: int | None


def measure(entry: catalogue.Entry) -> Kept | None:
    """Traces the first workload of a layer.

    Args:
        entry: the layer.

    Returns:
        What is kept; None for a layer without a workload, or one that needs its arrays' values.
    """
    if not entry.workloads:
        return None
    workload, make = next(iter(entry.workloads.items()))
    try:
        ours, inputs = _traced(lambda: make(entry.module))
        if entry.gradient == "surrogate":
            return Kept(workload, inputs, ours, None)
        if entry.reference is not None:
            theirs, _ = _traced(lambda: make(entry.reference))
        else:
            theirs, _ = _traced(lambda: make(entry.module), by_autodiff=True)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return None
    return Kept(workload, inputs, ours, theirs)


def _traced(make: Callable[[], tuple[Any, ...]], by_autodiff: bool = False) -> tuple[int, int]:
    """The bytes that the backward of an example keeps, and those of its inputs."""
    found: list[int] = []

    def trace() -> None:
        call, *args = make()
        if isinstance(call, nnx.Module):
            call, args = _call, [call, *args]
        split = [_differentiable(arg) for arg in args]

        def of_values(*values: Any) -> list[jax.Array]:
            out = call(*(put(value) for (_, put), value in zip(split, values, strict=True)))
            return [leaf for leaf in jax.tree.leaves(out) if _is_float(leaf)]

        with use_autodiff() if by_autodiff else nullcontext():
            found.append(residual_bytes(of_values, *(value for value, _ in split)))
        arrays = [arg for arg in args if hasattr(arg, "nbytes")]
        found.append(sum(array.size * array.dtype.itemsize for array in arrays))

    jax.eval_shape(trace)
    kept, inputs = found
    return kept, inputs


def _differentiable(arg: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The part of an argument that has a gradient, and how to put it back into the argument."""
    if isinstance(arg, nnx.Module):
        graphdef, params, fixed = nnx.split(arg, _is_trained, ...)
        return params, lambda params: nnx.merge(graphdef, params, fixed, copy=True)
    if _is_float(arg):
        return arg, lambda value: value
    return None, lambda _: arg


def _is_trained(path: Any, variable: Any) -> bool:
    return isinstance(variable, nnx.Param) and all(map(_is_float, jax.tree.leaves(variable)))


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _call(layer: Any, *inputs: Any) -> Any:
    return layer(*inputs)
