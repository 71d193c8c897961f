"""LSTMCell and OptimizedLSTMCell: a memory c behind an input, a forget and an output gate.

    forward   i, f, g, o = the blocks of a + u
              i = gate(i),  f = gate(f),  g = act(g),  o = gate(o)
              c' = f c + i g
              h' = o act(c')
    backward  do  = dh' act(c'),  dc' += dh' o act'(c')
              di  = dc' g,  df = dc' c,  dg = dc' i     each times the slope of its activation
              dc  = dc' f
    kept      i, f, g, o, and c

That is the product rule, from the last line of the forward to the first: c' reaches the loss as the
next memory and through h', so that its two cotangents are added before they go on to i, f, g and c.

Here a is the projection of the input and u that of h, and what is left is said in `recurrence`. The
sigmoid is `gate` and tanh is `act`, unless the cell was given other activations.

Source: Hochreiter and Schmidhuber, Long Short-Term Memory, Neural Computation 9(8), 1997
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.activation.pointwise import Pointwise
from flax_customgrad.layers.recurrent.cell_step import States, Step, activation
from flax_customgrad.layers.recurrent.recurrent_cell import Projections, RecurrentCell

Carry = tuple[jax.Array, jax.Array]
"""The memory c and the output h."""


@dataclass(frozen=True)
class LSTMStep(Step):
    """A step of an LSTM.

    Attributes:
        gate: the activation of the gates i, f and o.
        act: that of g and of c.
    """

    gate: Pointwise
    act: Pointwise
    blocks: ClassVar = 4
    bias: ClassVar = "hidden"

    def forward(self, a: jax.Array, u: jax.Array, states: States) -> tuple[States, States]:
        """The memory and the output; keeps the gates."""
        gate, act = self.gate.forward, self.act.forward
        c, _ = states
        i, f, g, o = self.split(a + u)
        i, f, g, o = gate(i), gate(f), act(g), gate(o)
        c = f * c + i * g
        return (c, o * act(c)), (i, f, g, o)

    def backward(self, kept: States, states: States, d: States) -> tuple[jax.Array, States]:
        """The cotangents of the gates, before their activations, and of the memory."""
        gate, act = self.gate.backward, self.act.backward
        (i, f, g, o), (c, h), (dc, dh) = kept, states, d
        act_c = self.act.forward(f * c + i * g)
        dc = dc + act(dh * o, act_c)
        di, df, dg, do = gate(dc * g, i), gate(dc * c, f), act(dc * i, g), gate(dh * act_c, o)
        return jnp.concatenate([di, df, dg, do], axis=-1), (dc * f, jnp.zeros_like(h))


class _LSTM(RecurrentCell):
    """What the two cells share."""

    __slots__ = ()
    gate_fn: Callable[..., Any]
    activation_fn: Callable[..., Any]

    def _step(self) -> LSTMStep | None:
        gate, act = activation(self.gate_fn), activation(self.activation_fn)
        return LSTMStep(gate, act) if gate and act else None

    def _states(self, carry: Carry) -> Carry:
        c, h = carry
        return c, h

    def _carry(self, states: States) -> States:
        return states


class LSTMCell(nnx.LSTMCell, _LSTM):
    """`nnx.LSTMCell` with a hand-written backward; inside `fcg.RNN` one operation over time.

    Constructor, parameters, initial values and results are those of `flax.nnx.LSTMCell`: one kernel
    for each gate. `OptimizedLSTMCell` has those of all gates in one, and saves their joining.

    With activations other than sigmoid, tanh and relu (of flax.nnx or of this library), with a
    `promote_dtype` of the user's own, with other layers in the place of its projections, and for
    inputs or a carry that are integer or complex, the cell computes as nnx does and JAX
    differentiates that.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> cell = fcg.LSTMCell(3, 4, rngs=nnx.Rngs(0))
        >>> carry = cell.initialize_carry((2, 3), rngs=nnx.Rngs(1))
        >>> (c, h), y = cell(carry, jnp.ones((2, 3)))
        >>> y.shape
        (2, 4)
    """

    def _projections(self) -> Mapping[str, Projections]:
        return {
            "_i": Projections(self.ii, self.hi),
            "_f": Projections(self.if_, self.hf),
            "_g": Projections(self.ig, self.hg),
            "_o": Projections(self.io, self.ho),
        }

    def __call__(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, jax.Array]:
        """One step in time.

        Args:
            carry: the memory c and the output h of the step before, each (..., hidden_features).
            inputs: array of shape (..., in_features).

        Returns:
            The new carry, and the output h, of shape (..., hidden_features).
        """
        found = self._one_step(carry, inputs)
        return super().__call__(carry, inputs) if found is None else found


class OptimizedLSTMCell(nnx.OptimizedLSTMCell, _LSTM):
    """`nnx.OptimizedLSTMCell` with a hand-written backward; inside `fcg.RNN` one operation.

    Constructor, parameters, initial values and results are those of
    `flax.nnx.OptimizedLSTMCell`. With activations other than sigmoid, tanh and relu (of flax.nnx or
    of this library), with a `promote_dtype` of the user's own, with other layers in the place of
    its projections, and for inputs or a carry that are integer or complex, the cell computes as nnx
    does and JAX differentiates that.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> rnn = fcg.RNN(fcg.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0)))
        >>> rnn(jnp.ones((2, 5, 3))).shape
        (2, 5, 4)
    """

    def __call__(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, jax.Array]:
        """One step in time.

        Args:
            carry: the memory c and the output h of the step before, each (..., hidden_features).
            inputs: array of shape (..., in_features).

        Returns:
            The new carry, and the output h, of shape (..., hidden_features).
        """
        found = self._one_step(carry, inputs)
        return super().__call__(carry, inputs) if found is None else found
