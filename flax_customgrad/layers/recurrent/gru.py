"""GRUCell: a state h that a gate mixes with a new one.

    forward   r  = gate(a_r + u_r),  z = gate(a_z + u_z)
              n  = act(a_n + r u_n)
              h' = (1 - z) n + z h
    backward  dz   = dh' (h - n),  da_n = dh' (1 - z) act'(n),  dr = da_n u_n
              da_r = dr gate'(r),  da_z = dz gate'(z)
              du   = da_r, da_z, da_n r
              dh   = dh' z
    kept      r, z, n and u_n

Here a is the projection of the input and u that of h, three blocks each, and what is left is said
in `recurrence`. The sigmoid is `gate` and tanh is `act`, unless the cell was given other
activations.

Source: arXiv:1406.1078
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
class GRUStep(Step):
    """A step of a GRU.

    Attributes:
        gate: the activation of r and z.
        act: that of n.
    """

    gate: Pointwise
    act: Pointwise
    blocks: ClassVar = 3

    def forward(self, a: jax.Array, u: jax.Array, states: States) -> tuple[States, States]:
        """The new state; keeps the gates, and what r multiplies."""
        (h,), (a_r, a_z, a_n), (u_r, u_z, u_n) = states, self.split(a), self.split(u)
        r, z = self.gate.forward(a_r + u_r), self.gate.forward(a_z + u_z)
        n = self.act.forward(a_n + r * u_n)
        return ((1.0 - z) * n + z * h,), (r, z, n, u_n)

    def backward(self, kept: States, states: States, d: States) -> tuple[jax.Array, States]:
        """The cotangents of the gates, before their activations, and of the state."""
        (r, z, n, u_n), (h,), (dh,) = kept, states, d
        da_n = self.act.backward(dh * (1 - z), n)
        da_r, da_z = self.gate.backward(da_n * u_n, r), self.gate.backward(dh * (h - n), z)
        return jnp.concatenate([da_r, da_z, da_n], axis=-1), (dh * z,)

    def of_hidden(self, da: jax.Array, kept: States) -> jax.Array:
        """That of u, whose last block r multiplies."""
        r, *_ = kept
        da_r, da_z, da_n = self.split(da)
        return jnp.concatenate([da_r, da_z, da_n * r], axis=-1)


class GRUCell(nnx.GRUCell, RecurrentCell):
    """`nnx.GRUCell` with a hand-written backward; inside `fcg.RNN` one operation over time.

    Constructor, parameters, initial values and results are those of `flax.nnx.GRUCell`. With
    activations other than sigmoid, tanh and relu (of flax.nnx or of this library), with a
    `promote_dtype` of the user's own, with other layers in the place of its projections, and for
    inputs or a carry that are integer or complex, the cell computes as nnx does and JAX
    differentiates that.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> rnn = fcg.RNN(fcg.GRUCell(3, 4, rngs=nnx.Rngs(0)), return_carry=True)
        >>> h, y = rnn(jnp.ones((2, 5, 3)))
        >>> h.shape, y.shape
        ((2, 4), (2, 5, 4))

    Source: arXiv:1406.1078
    """

    def _step(self) -> GRUStep | None:
        gate, act = activation(self.gate_fn), activation(self.activation_fn)
        return GRUStep(gate, act) if gate and act else None

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
