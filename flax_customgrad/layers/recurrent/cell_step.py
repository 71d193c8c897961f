"""`Step`: what tells one recurrent cell from another, with its backward; and its activations.

A step takes the projections a of the input and u of the state h, blocks of features one beside the
other, and the states before: tuples whose last array is h, which is the output too.

    forward   states', kept = step.forward(a, u, states)
    backward  da, dstates   = step.backward(kept, states, dstates')     without what u passes to h
              du            = step.of_hidden(da, kept)

The activations are those whose derivative is a function of what they return: kept are the gates,
not what they are computed from.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.activation.piecewise import RELU, relu
from flax_customgrad.layers.activation.pointwise import Pointwise
from flax_customgrad.layers.activation.sigmoidal import SIGMOID, TANH, sigmoid, tanh

States = tuple[jax.Array, ...]
"""The arrays that a cell carries, each of shape (..., features); the last is its output h."""

_ACTIVATIONS = (
    *((function, SIGMOID) for function in (nnx.sigmoid, sigmoid)),
    *((function, TANH) for function in (nnx.tanh, tanh)),
    *((function, RELU["output"]) for function in (nnx.relu, relu)),
)


def activation(function: Callable[..., Any]) -> Pointwise | None:
    """The rules of sigmoid, tanh or relu, of flax.nnx or of this library; None for another one."""
    return next((rules for known, rules in _ACTIVATIONS if known is function), None)


class Step(ABC):
    """One step in time; a subclass is a frozen dataclass.

    Attributes:
        blocks: how many blocks of features a and u have.
        bias: what the bias is added to, "input" for a and "hidden" for u.
    """

    blocks: ClassVar[int]
    bias: ClassVar[Literal["input", "hidden"]] = "input"

    @abstractmethod
    def forward(self, a: jax.Array, u: jax.Array, states: States) -> tuple[States, States]:
        """The step.

        Args:
            a: projection of the input, (..., blocks * features), float.
            u: projection of h, likewise.
            states: those before, each (..., features), float.

        Returns:
            The states after, and what the backward needs beside those before: arrays of shape
            (..., features).
        """

    @abstractmethod
    def backward(self, kept: States, states: States, d: States) -> tuple[jax.Array, States]:
        """The backward of the step; every array is float32 or wider.

        Args:
            kept: what `forward` kept.
            states: those before.
            d: the cotangents of the states after.

        Returns:
            The cotangent of a, and those of the states before, without what passes through u.
        """

    def of_hidden(self, da: jax.Array, kept: States) -> jax.Array:
        """The cotangent of u; that of a, where u is added to it.

        Args:
            da: the cotangent of a, (..., blocks * features).
            kept: what `forward` kept.
        """
        return da

    def split(self, array: jax.Array) -> list[jax.Array]:
        """The blocks of features of an array of shape (..., blocks * features)."""
        return jnp.split(array, self.blocks, axis=-1)
