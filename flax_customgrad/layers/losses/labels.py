"""Labels of a loss: checked where they are known, and as numbers of classes, -1 for none."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_customgrad.contract.compat import is_traced


def class_numbers(
    function: str, labels: jax.Array, classes: int, ignore_index: int | None, where: Any = None
) -> jax.Array:
    """Labels as numbers of classes, and -1 for what is no class.

    Args:
        function: the name of the loss, for the error.
        labels: integers of any shape.
        classes: how many classes there are.
        ignore_index: the label of rows that do not count, or None.
        where: the rows whose labels are read, of the shape of `labels`; None for all.

    Returns:
        Integers of 32 bits or more, of the same shape: -1 where a label is `ignore_index`, or is
        not from 0 to `classes - 1`, which is found out for traced labels only so.

    Raises:
        TypeError: labels are not integers.
        ValueError: a label is none of these, in an array that is not traced.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{function}: labels are {labels.dtype}; expected integers")
    if not is_traced(labels) and not is_traced(where):
        known = np.asarray(labels)
        is_wrong = (known < 0) | (known >= classes)
        if ignore_index is not None:
            is_wrong &= known != ignore_index
        if where is not None:
            is_wrong &= np.asarray(where)
        if is_wrong.any():
            raise ValueError(
                f"{function}: the label {known[is_wrong].flat[0]} is none of the {classes} "
                f"classes, 0 to {classes - 1}"
            )
    if labels.dtype.itemsize < 4 or labels.dtype == jnp.uint32:
        labels = labels.astype(jnp.int32)
    is_class = (labels >= 0) & (labels < classes)
    if ignore_index is not None:
        is_class &= labels != ignore_index
    return jnp.where(is_class, labels, -1)


def check_share(function: str, argument: str, value: Any) -> float:
    """Refuses a share that is not a number from 0 to below 1.

    Args:
        function: the name of the loss, for the error.
        argument: the name of the argument, for the error.
        value: the share.

    Returns:
        The share as a number of Python.

    Raises:
        TypeError: the share is traced.
        ValueError: it is not from 0 to below 1.
    """
    share = static_number(function, argument, value)
    if not 0 <= share < 1:
        raise ValueError(f"{function}: {argument}={value!r} must be from 0 to below 1")
    return share


def static_number(function: str, argument: str, value: Any) -> float:
    """A number of Python, NumPy or JAX as one of Python.

    Args:
        function: the name of the loss, for the error.
        argument: the name of the argument, for the error.
        value: the number.

    Raises:
        TypeError: the number is traced.
    """
    if is_traced(value):
        raise TypeError(
            f"{function}: {argument} is traced, and has to be known: make it a static argument of "
            "jax.jit"
        )
    return float(value)
