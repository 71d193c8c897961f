"""`RecurrentCell`: mixed into a cell of nnx, computes it with `recurrence`, one step or many."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.nnx.nn import dtypes as nnx_dtypes
from jax import lax

from flax_customgrad.layers.drop_in import (
    Parameters,
    has_custom_product,
    has_known_size,
    has_own_bias,
    parameters,
)
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.recurrent.cell_step import States, Step
from flax_customgrad.layers.recurrent.recurrence import RecurrenceConfig, recurrence
from flax_customgrad.numerics.dtypes import as_array, is_supported_float, takes_custom_backward
from flax_customgrad.numerics.products import MatmulConfig


class Projections(NamedTuple):
    """The two layers of a gate, or of all gates in one."""

    of_input: Any
    of_hidden: Any


class RecurrentCell:
    """Mixed into a cell of nnx: its steps over time are one operation with a hand-written backward.

    It comes after the cell among the bases: only then can a cell of nnx become one of these. Where
    `_over_time` returns None the cell computes as nnx does.
    """

    __slots__ = ()
    # What the cells of nnx hold.
    hidden_features: int
    promote_dtype: Any

    def _step(self) -> Step | None:
        """The cell's step; None for an activation that has no rules in `cell_step`."""
        raise NotImplementedError

    def _projections(self) -> Mapping[str, Projections]:
        """The layers of each gate, by its name; "" where one has those of all."""
        return {"": Projections(self.dense_i, self.dense_h)}  # type: ignore[attr-defined]

    def _states(self, carry: Any) -> States:
        """What a cell carries as a tuple, the output last."""
        return (carry,)

    def _carry(self, states: States) -> Any:
        """What a cell carries, as the cell has it."""
        (h,) = states
        return h

    def _over_time(self, carry: Any, inputs: Any, unroll: int = 1) -> tuple[Any, jax.Array] | None:
        """Runs the cell over time.

        Args:
            carry: what to start with, arrays of shape (..., hidden_features).
            inputs: array of shape (..., T, in_features).
            unroll: how many steps an iteration of the compiled loop takes.

        Returns:
            The carry after each step, arrays of shape (..., T, hidden_features), and the outputs,
            likewise; or None.
        """
        x = as_array(inputs)
        if not is_supported_float(x) or x.ndim < 2 or not has_known_size(x, 1) or not x.shape[-2]:
            return None
        return self._run(carry, x, x.shape[:-2], unroll=unroll)

    def _one_step(self, carry: Any, inputs: Any) -> tuple[Any, jax.Array] | None:
        """The carry and the output after one step, for inputs of shape (..., in_features)."""
        x = as_array(inputs)
        if not is_supported_float(x) or not x.ndim:
            return None
        return self._run(carry, x, x.shape[:-1], one_step=True)

    def _run(
        self, carry: Any, x: jax.Array, batch: tuple[int, ...], **loop: Any
    ) -> tuple[Any, jax.Array] | None:
        """What `recurrence` returns; None where it does not compute what nnx would."""
        step, states = self._step(), tuple(as_array(s) for s in self._states(carry))
        shape = (*batch, self.hidden_features)
        if step is None or not all(is_supported_float(s) and s.shape == shape for s in states):
            return None
        found = self._parameters(step, x, states)
        if found is None:
            return None
        params, product = found
        config = RecurrenceConfig(product, tuple(self._projections()), **loop)
        states = recurrence(nnx.State(params), states, x, step, config)
        return self._carry(states), states[-1]

    def _parameters(
        self, step: Step, x: jax.Array, states: States
    ) -> tuple[dict[str, jax.Array], MatmulConfig] | None:
        """W, U and b of each gate, and the settings of their products, which all share; or None."""
        projections = self._projections()
        first = next(iter(projections.values())).of_input
        settings = (first.dtype, first.precision)
        if self.promote_dtype is not nnx_dtypes.promote_dtype:
            return None
        if not takes_custom_backward(x, *states, dtype=first.dtype):
            return None
        params: dict[str, jax.Array] = {}
        outputs = step.blocks * self.hidden_features // len(projections)
        for gate, layers in projections.items():
            biased = layers.of_input if step.bias == "input" else layers.of_hidden
            for name, layer, array in (
                ("W", layers.of_input, x),
                ("U", layers.of_hidden, states[-1]),
            ):
                found = _kernel_and_bias(layer, array, outputs)
                has_bias = found is not None and "bias" in found
                if found is None or has_bias != (layer is biased):
                    return None
                if (layer.dtype, layer.precision) != settings:
                    return None
                params[f"{name}{gate}"] = found["kernel"]
                if has_bias:
                    params[f"b{gate}"] = found["bias"]
        return params, MatmulConfig(*settings)


def _kernel_and_bias(layer: Any, array: jax.Array, outputs: int) -> Parameters | None:
    """The parameters of a projection; None where it is not the plain product that nnx makes it."""
    if type(layer) not in (nnx.Linear, Linear):
        return None
    found = parameters(layer, "kernel", "bias")
    is_plain = (
        layer.dot_general is lax.dot_general
        and layer.preferred_element_type is None
        and found["kernel"].shape == (array.shape[-1], outputs)
        and has_own_bias(layer, found, (outputs,))
        and has_custom_product(layer, array, found)
    )
    return found if is_plain else None
