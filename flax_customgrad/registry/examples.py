"""Makers of examples for catalogue entries: inputs, a layer that is called, a function applied."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.registry.entry import Example

RANDOM_BIAS: Mapping[str, Any] = {"bias_init": nnx.initializers.normal(1.0)}
"""The keyword of a constructor that keeps a bias from being zero, which would hide errors."""


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Normally distributed inputs, the same at every call.

    Args:
        *shape: the shape.
        dtype: a floating dtype.

    Returns:
        Array of that shape and dtype.
    """
    return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)


def made(*args: Any, inputs: tuple[Any, ...], call: Any = None, **kwargs: Any) -> Example:
    """An example whose layer is built as `cls(*args, **kwargs, rngs=...)`.

    Args:
        *args: positional arguments of the constructor.
        inputs: arrays, or functions that make them.
        call: how to call the layer, if not as `layer(*inputs)`: a function of both.
        **kwargs: keyword arguments of the constructor.
    """

    def make(cls: Any) -> tuple[Any, ...]:
        layer = cls(*args, **kwargs, rngs=nnx.Rngs(0))
        arrays = tuple(x() if callable(x) else x for x in inputs)
        return (layer, *arrays) if call is None else (call, layer, *arrays)

    return make


def applied(*inputs: Any, **kwargs: Any) -> Example:
    """An example that applies a function to arrays.

    Args:
        *inputs: arrays, or functions that make them.
        **kwargs: keyword arguments of the function.
    """

    def make(function: Any) -> tuple[Any, ...]:
        arrays = tuple(x() if callable(x) else x for x in inputs)
        return (partial(function, **kwargs) if kwargs else function, *arrays)

    return make


def on_a_copy(layer: Any, *inputs: Any) -> Any:
    """Calls a copy of a layer that a call changes: `check_vjp` calls it repeatedly.

    Args:
        layer: the layer.
        *inputs: what it is called with.
    """
    return nnx.clone(layer)(*inputs)


def straight_through(a: jax.Array, value: jax.Array) -> jax.Array:
    """A value with the gradient of an array, for the formulas of surrogates.

    Args:
        a: array of any shape, float.
        value: array of that shape, float.
    """
    return a + jax.lax.stop_gradient(value - a)
