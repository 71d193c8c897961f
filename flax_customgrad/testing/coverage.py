"""What an example does not cover: mistakes that a check could not see, whatever the transform.

A hint is no failure. It names an argument and says what to choose differently.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.contract.arguments import by_path, is_parameters
from flax_customgrad.testing.problem import Problem

# What layers leave out where it is None.
_OPTIONAL = ("bias", "scale", "mask")
# What does nothing where it is 1.
_AT_LEAST_ONE = (
    "strides",
    "window_strides",
    "kernel_dilation",
    "input_dilation",
    "feature_group_count",
    "num_groups",
)


class Hint(NamedTuple):
    """Something that an example does not cover.

    Attributes:
        argument: the name of an array or of a setting, such as "m.kernel" or "strides".
        text: what it is, in a few words.
    """

    argument: str
    text: str

    def __str__(self) -> str:
        return f"{self.argument} {self.text}"


def hints(problem: Problem, names: Mapping[str, Any]) -> list[Hint]:
    """What the arguments of a check leave uncovered.

    Args:
        problem: the function and its arguments.
        names: the arguments by name, with the keywords of a `functools.partial`.
    """
    found = [hint for i in range(len(problem.arrays)) for hint in _of_array(problem, i)]
    for name, argument in names.items():
        found += _of_setting(name, argument)
        if is_parameters(argument):
            for path, leaf in by_path(argument):
                found += _of_setting(".".join(map(str, (name, *path))), leaf)
        if isinstance(argument, nnx.Module):
            for path, module in nnx.iter_modules(argument):
                for attribute in (*_OPTIONAL, *_AT_LEAST_ONE):
                    if hasattr(module, attribute):
                        place = ".".join(map(str, (name, *path, attribute))).lstrip(".")
                        found += _of_setting(place, getattr(module, attribute))
    return list(dict.fromkeys(found))


def of_gradient(name: str, gradient: np.ndarray) -> Iterator[Hint]:
    """What an expected gradient leaves uncovered.

    Args:
        name: of its array.
        gradient: array of any shape, float.
    """
    if not np.isfinite(gradient).all():
        yield Hint(name, "has an expected gradient that is not finite")
    elif gradient.size and not gradient.any():
        yield Hint(name, "has a gradient of 0 everywhere")


def _of_array(p: Problem, i: int) -> Iterator[Hint]:
    array, name = p.arrays[i], p.names[i]
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return
    values, shape = np.asarray(array), tuple(array.shape)
    is_input = i not in p.parameters
    if array.dtype == jnp.bool_:
        if values.all() or not values.any():
            yield Hint(name, f"is {bool(values.all())} everywhere")
    elif jnp.issubdtype(array.dtype, jnp.signedinteger) and is_input:
        if array.size == np.unique(values).size:
            yield Hint(name, "holds no number twice")
    elif i in p.differentiable:
        if array.size > 1 and np.unique(values).size == 1:
            yield Hint(name, f"is {values.flat[0]:g} everywhere")
        elif array.size == 1 and values.item() in (0, 1):
            yield Hint(name, f"is {values.item():g}")
        if is_input and shape and shape[0] == 1:
            yield Hint(name, "has a batch of 1")
        yield from _of_shape(name, shape)


def _of_shape(name: str, shape: tuple[int, ...]) -> Iterator[Hint]:
    long = [size for size in shape if size > 1]
    if len(shape) == 2 and len(long) < 2:
        yield Hint(name, f"has an axis of size 1, {shape}")
    if len(set(long)) < len(long):
        yield Hint(name, f"has axes of the same size, {shape}")


def _of_setting(name: str, value: Any) -> Iterator[Hint]:
    word = name.rpartition(".")[2]
    if word in _OPTIONAL and value is None:
        yield Hint(name, "is None")
    if word in _AT_LEAST_ONE and _is_one(value):
        yield Hint(name, "is 1")


def _is_one(value: Any) -> bool:
    is_numbers = isinstance(value, int | tuple | list)
    return is_numbers and bool(np.all(np.asarray(value) == 1))
