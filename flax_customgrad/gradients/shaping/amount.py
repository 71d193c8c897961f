"""How much a gradient is changed: a number, an array, or a schedule."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_customgrad.numerics.broadcasting import broadcasts
from flax_customgrad.numerics.dtypes import as_array, is_python_number

Amount = float | jax.Array
"""A number, which is static, or an array, which may be traced."""

Schedule = Callable[[Any], Any]
"""A function of a step that returns a number or an array, such as those of optax."""


def checked(name: str, amount: Any, *, positive: bool = False) -> Any:
    """An amount: a number as it is, an array as one of JAX.

    Args:
        name: what it is called, such as "GradientScale: scale", for the errors.
        amount: a number, or an array of real numbers; the values of an array are not looked at.
        positive: whether a number has to be positive, and may be infinite.

    Raises:
        TypeError: it is neither.
        ValueError: a number that is not finite, or not positive.
    """
    amount = as_array(amount)
    if is_python_number(amount):
        if positive and not amount > 0:
            raise ValueError(f"{name}={amount!r} must be positive")
        if not positive and not math.isfinite(amount):
            raise ValueError(f"{name}={amount!r} must be finite")
    elif not isinstance(amount, jax.Array) or amount.dtype == bool or jnp.iscomplexobj(amount):
        raise TypeError(f"{name} is {_described(amount)}; write a number or an array of numbers")
    return amount


def at_step(name: str, amount: Amount | Schedule, step: Any) -> Any:
    """What a schedule says for a step; an amount as it is.

    Args:
        name: what it is called, such as "GradientScale: scale", for the errors.
        amount: a number, an array or a schedule.
        step: what the schedule takes; None where there is none.

    Raises:
        TypeError: there is a schedule and no step.
    """
    if not callable(amount):
        return amount
    if step is None:
        raise TypeError(f"{name} is a schedule, a function of a step: write layer(x, step)")
    return amount(as_array(step))


def check_broadcasts(name: str, amount: Any, x: jax.Array) -> None:
    """Checks that an amount has a value for each element of an array, and no more.

    Args:
        name: what it is called, for the error.
        amount: a number or an array.
        x: the array.

    Raises:
        ValueError: the amount does not broadcast to the shape of x.
    """
    shape = jnp.shape(amount)
    if not broadcasts(shape, x.shape):
        raise ValueError(
            f"{name} has shape {shape}, which does not broadcast to the shape {x.shape} of x"
        )


def _described(amount: Any) -> str:
    if isinstance(amount, jax.Array):
        return f"an array of {amount.dtype}"
    return f"{amount!r}, a {type(amount).__name__}"
