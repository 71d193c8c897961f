"""SimpleCell: a state that is an activation of two projections.

    forward   h' = act(a + u)             and act(a + u + h) with residual=True
    backward  da = du = dh' act'(h')
              dh = 0                      and da with residual=True
    kept      h'

Here a is the projection of the input and u that of h, and what is left is said in `recurrence`.

Source: https://doi.org/10.1207/s15516709cog1402_1
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.activation.pointwise import Pointwise
from flax_customgrad.layers.recurrent.cell_step import States, Step, activation
from flax_customgrad.layers.recurrent.recurrent_cell import RecurrentCell


@dataclass(frozen=True)
class SimpleStep(Step):
    """A step of a simple recurrent network.

    Attributes:
        act: its activation.
        residual: whether h is added within it.
    """

    act: Pointwise
    residual: bool
    blocks: ClassVar = 1

    def forward(self, a: jax.Array, u: jax.Array, states: States) -> tuple[States, States]:
        """The new state, which is kept too."""
        (h,) = states
        new = a + u + h if self.residual else a + u
        new = self.act.forward(new)
        return (new,), (new,)

    def backward(self, kept: States, states: States, d: States) -> tuple[jax.Array, States]:
        """The cotangents of the activation's argument, and of the state."""
        (new,), (dh,) = kept, d
        da = self.act.backward(dh, new)
        return da, (da if self.residual else jnp.zeros_like(da),)


class SimpleCell(nnx.SimpleCell, RecurrentCell):
    """`nnx.SimpleCell` with a hand-written backward; inside `fcg.RNN` one operation over time.

    Constructor, parameters, initial values and results are those of `flax.nnx.SimpleCell`. With an
    activation other than sigmoid, tanh and relu (of flax.nnx or of this library), with a
    `promote_dtype` of the user's own, with other layers in the place of its projections, and for
    inputs or a carry that are integer or complex, the cell computes as nnx does and JAX
    differentiates that.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> rnn = fcg.RNN(fcg.SimpleCell(3, 4, rngs=nnx.Rngs(0)), reverse=True)
        >>> rnn(jnp.ones((2, 5, 3))).shape
        (2, 5, 4)
    """

    def _step(self) -> SimpleStep | None:
        act = activation(self.activation_fn)
        return SimpleStep(act, bool(self.residual)) if act else None

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step in time.

        Args:
            carry: the output h of the step before, of shape (..., hidden_features).
            inputs: array of shape (..., in_features).

        Returns:
            The new carry, and the output, which is the same.
        """
        found = self._one_step(carry, inputs)
        return super().__call__(carry, inputs) if found is None else found
