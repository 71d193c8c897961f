"""Stacked layers: many of one kind in one object, as `nnx.vmap` makes and `nnx.scan` runs them.

Each Variable of a stack has the axes of the stack in front of its own. What is done to a layer with
Python, such as measuring a range of its weights, is done to each of a stack, and the results are
stacked again.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

M = TypeVar("M", bound=nnx.Pytree)
Index = tuple[int, ...]


def stack_axes(layer: Any) -> tuple[int, ...]:
    """The sizes of the axes along which a layer of nnx, or a drop-in, is stacked; () for one layer.

    Args:
        layer: a layer with a `kernel`, or an `embedding`.
    """
    table = getattr(layer, "embedding", None)
    weights = layer.kernel if table is None else table
    return tuple(weights.shape[: len(weights.shape) - _ndim(layer)])


def _ndim(layer: Any) -> int:
    """How many axes the weights of one layer have."""
    if isinstance(layer, nnx.LinearGeneral):
        return len(layer.batch_axis) + len(layer.in_features) + len(layer.out_features)
    shape = getattr(layer, "kernel_shape", None)
    return 2 if shape is None else len(shape)


def unstack(module: M, axes: tuple[int, ...]) -> dict[Index, M]:
    """The modules of a stack, by index; of one module itself.

    Args:
        module: a module, each Variable of which has the axes of the stack in front.
        axes: the sizes of those axes.
    """
    if not axes:
        return {(): module}
    graphdef, state = nnx.split(module, graph=True)
    return {
        index: nnx.merge(graphdef, jax.tree.map(lambda a, index=index: a[index], state))
        for index in np.ndindex(axes)
    }


def stack(modules: dict[Index, M], axes: tuple[int, ...]) -> M:
    """One module of the modules of a stack; the inverse of `unstack`.

    Args:
        modules: modules of one structure, by index.
        axes: the sizes of the axes of the stack.
    """
    if not axes:
        return modules[()]
    split = [nnx.split(module, graph=True) for module in modules.values()]
    leaves = [jax.tree.leaves(state) for _, state in split]
    graphdef, state = split[0]
    stacked = [jnp.stack(a).reshape(*axes, *a[0].shape) for a in zip(*leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), stacked))


def repeated(module: M, axes: tuple[int, ...]) -> M:
    """A stack of copies of a module, of which each draws random numbers of its own.

    Args:
        module: the module; it is returned as it is where there are no axes.
        axes: the sizes of the axes of the stack.
    """
    if not axes:
        return module

    def copies(variable: Any) -> Any:
        value = variable[...]
        if isinstance(variable, nnx.RngKey):
            return jax.random.split(value, math.prod(axes)).reshape(axes)
        return jnp.broadcast_to(value, (*axes, *value.shape))

    other = nnx.clone(module, graph=True)
    for _, variable in nnx.iter_graph(other, graph=True):
        if isinstance(variable, nnx.Variable):
            variable.set_value(copies(variable))
    return other


def for_each(make: Callable[[Index], M], axes: tuple[int, ...]) -> M:
    """A stack of modules that a function makes.

    Args:
        make: a function of the index of a module in the stack.
        axes: the sizes of the axes of the stack; () for one module.
    """
    return stack({index: make(index) for index in np.ndindex(axes)}, axes)
