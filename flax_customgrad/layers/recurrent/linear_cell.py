"""`LinearCell`: the base of cells that are linear in their state: all steps are one operation."""

from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.recurrent.initial_carry import initial_carry
from flax_customgrad.layers.recurrent.linear_recurrence import linear_recurrence
from flax_customgrad.numerics.dtypes import as_array, in_dtype


class LinearCell(nnx.RNNCellBase):
    """A cell with h_t = a_t h_{t-1} + b_t, where a_t and b_t depend on the input x_t alone.

    `__call__` takes one step, for `nnx.RNN` or `lax.scan`. `fcg.RNN` around it computes all steps
    at once, by `linear_recurrence`, with the same numbers but for rounding.
    """

    hidden_features: int

    @abstractmethod
    def _terms(self, x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The factors a and the terms b for inputs of shape (..., in_features), in a dtype."""

    @abstractmethod
    def _output(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """The output for states of shape (..., hidden_features) and inputs."""

    @property
    @abstractmethod
    def _carry_dtype(self) -> Any:
        """The dtype of the states: float32 or complex64, or wider where the parameters are."""

    @property
    def num_feature_axes(self) -> int:
        """How many axes of features an input has; `RNN` reads it."""
        return 1

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: nnx.Initializer | None = None,
    ) -> jax.Array:
        """The state to start with: 0.

        Args:
            input_shape: the shape of the inputs of one step, (..., in_features).
            rngs: random numbers for `carry_init`.
            carry_init: an initializer to use instead.

        Returns:
            An array of shape (..., hidden_features), float32 or complex64 or wider.

        Raises:
            ValueError: `carry_init` is given and `rngs` is not.
        """
        shape = (*input_shape[:-1], self.hidden_features)
        return initial_carry(type(self).__name__, shape, self._carry_dtype, rngs, carry_init)

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step in time.

        Args:
            carry: the state h of the step before, of shape (..., hidden_features).
            inputs: array of shape (..., in_features).

        Returns:
            The new state, like carry, and the output.
        """
        carry, x = as_array(carry), jnp.asarray(as_array(inputs))
        a, b = self._terms(x, carry.dtype)
        h = in_dtype(a * carry + b, carry.dtype)
        return h, self._output(h, x)

    def _over_time(
        self, carry: jax.Array, inputs: jax.Array, unroll: int = 1
    ) -> tuple[jax.Array, jax.Array]:
        """The states and the outputs of all steps, for inputs of shape (..., T, in_features)."""
        carry = as_array(carry)
        a, b = self._terms(inputs, carry.dtype)
        h = in_dtype(linear_recurrence(a, b, carry, axis=-2), carry.dtype)
        return h, self._output(h, inputs)
