"""The arguments of gradient shaping: numbers, arrays and schedules of them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.numerics.broadcasting import broadcasts
from flax_customgrad.numerics.dtypes import as_array, is_python_number

NumberOrArray = float | jax.Array
"""A number, which is static, or an array, which may be traced."""

Schedule = Callable[[Any], Any]
"""A function of a step that returns a number or an array, such as those of optax."""


def check_number_or_array(name: str, value: Any, *, positive: bool = False) -> Any:
    """A number as it is, or an array as one of JAX.

    Args:
        name: what it is called, such as "GradientScale: scale", for the errors.
        value: a number, or an array of real numbers; the values of an array are not looked at.
        positive: whether a number has to be positive, and may be infinite.

    Raises:
        TypeError: it is neither.
        ValueError: a number that is not finite, or not positive.
    """
    value = as_array(value)
    if is_python_number(value):
        if positive and not value > 0:
            raise ValueError(f"{name}={value!r} must be positive")
        if not positive and not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be finite")
    elif not isinstance(value, jax.Array) or value.dtype == bool or jnp.iscomplexobj(value):
        raise TypeError(f"{name} is {_description(value)}; write a number or an array of numbers")
    return value


def check_setting(name: str, value: Any, *, positive: bool = False) -> Any:
    """What a layer holds: a number, an array, a Variable of either, or a schedule.

    Args:
        name: what it is called, such as "GradientScale: scale", for the errors.
        value: one of these; a Variable is kept, so that it can be set from outside.
        positive: whether a number has to be positive, and may be infinite.

    Raises:
        TypeError: it is none of them.
        ValueError: a number that is not finite, or not positive.
    """
    if _is_schedule(value):
        return value
    checked = check_number_or_array(name, value, positive=positive)
    return value if isinstance(value, nnx.Variable) else checked


def _is_schedule(value: Any) -> bool:
    # A Variable can be called, as what it holds would be.
    return callable(value) and not isinstance(value, nnx.Variable)


def value_at_step(name: str, value: NumberOrArray | Schedule, step: Any) -> Any:
    """What a schedule returns for a step; a number or an array as it is.

    Args:
        name: what it is called, such as "GradientScale: scale", for the errors.
        value: a number, an array, a Variable or a schedule.
        step: what the schedule takes; None where there is none.

    Raises:
        TypeError: there is a schedule and no step.
    """
    if not _is_schedule(value):
        return as_array(value)
    if step is None:
        raise TypeError(f"{name} is a schedule, a function of a step: write layer(x, step)")
    return value(as_array(step))  # type: ignore[operator]


def map_arrays(shape: Callable[[jax.Array], jax.Array], x: Any) -> Any:
    """Applies gradient shaping to each array of a tree, on its own.

    Args:
        shape: a function of one array.
        x: an array, or a tree of arrays and numbers; a Variable counts as its array.

    Returns:
        A tree like x, of arrays of JAX.
    """

    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    return jax.tree.map(lambda leaf: shape(jnp.asarray(leaf)), x, is_leaf=is_variable)


def check_broadcasts(name: str, value: Any, x: jax.Array) -> None:
    """Checks that there is one value for each element of an array.

    Args:
        name: what the value is called, for the error.
        value: a number or an array.
        x: the array.

    Raises:
        ValueError: the value does not broadcast to the shape of x.
    """
    shape = jnp.shape(value)
    if not broadcasts(shape, x.shape):
        raise ValueError(
            f"{name} has shape {shape}, which does not broadcast to the shape {x.shape} of x"
        )


def _description(value: Any) -> str:
    if isinstance(value, jax.Array):
        return f"an array of {value.dtype}"
    return f"{value!r}, a {type(value).__name__}"
