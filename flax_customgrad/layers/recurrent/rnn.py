"""RNN: a cell over time, which is one operation where the cell is one of this library.

    forward   carry_t, y_t = cell(carry_{t-1}, x_t)
    backward  that of the cell's operation over time: `recurrence`, or `linear_recurrence`
    kept      what that keeps

The scan of nnx calls a cell once in every step, input projection and all, and autodiff adds to the
gradient of every parameter in every step. Sequences of several lengths, their order and the choice
of the last carry are as in nnx.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.recurrent import flip_sequences

from flax_customgrad.layers.drop_in import given
from flax_customgrad.layers.recurrent.gru import GRUCell
from flax_customgrad.layers.recurrent.lru import LRU
from flax_customgrad.layers.recurrent.lstm import LSTMCell, OptimizedLSTMCell
from flax_customgrad.layers.recurrent.min_gru import MinGRU
from flax_customgrad.layers.recurrent.simple import SimpleCell
from flax_customgrad.numerics.dtypes import as_array

_CELLS = (LSTMCell, OptimizedLSTMCell, GRUCell, SimpleCell, LRU, MinGRU)
_CARRIED = nnx.StateAxes({...: nnx.Carry})


class RNN(nnx.RNN):
    """`nnx.RNN` that runs a cell of this library as one operation with a hand-written backward.

    Constructor, call and results are those of `flax.nnx.RNN`. Around `LSTMCell`,
    `OptimizedLSTMCell`, `GRUCell`, `SimpleCell`, `LRU` and `MinGRU` of this library, and no
    subclass of them, all steps are one operation: the inputs are projected at once, and so are the
    gradients of the parameters, after a scan that computes those of the gates alone. Around any
    other cell it is the scan of nnx; so it is with `state_axes` or `broadcast_rngs`, where the
    cell itself computes as nnx does, and without a step. The axes of `seq_lengths` are those of the
    batch, of which there may be several.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> rnn = fcg.RNN(fcg.GRUCell(3, 4, rngs=nnx.Rngs(0)), return_carry=True)
        >>> h, y = rnn(jnp.ones((2, 5, 3)), seq_lengths=jnp.array([5, 2]))
        >>> bool((h[1] == y[1, 1]).all())
        True
    """

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Any = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Any:
        """Applies the cell to every step.

        Args:
            inputs: array of shape (..., T, in_features), or (T, ..., in_features) if `time_major`.
            initial_carry: what to start with; None for what the cell initializes.
            seq_lengths: integers of the shape of the batch: how many steps of each sequence there
                are, for `reverse` and for the carry that is returned. None for all.
            return_carry: whether the last carry is returned; None for what the layer was made with,
                as for those that follow.
            time_major: whether time is the first axis.
            reverse: whether the last step comes first.
            keep_order: whether the outputs of a reversed sequence are in the order of the inputs.
            rngs: random numbers for the initial carry.

        Returns:
            The outputs, with the axes of the inputs; or the last carry and the outputs.
        """
        x = as_array(inputs)
        settings = {
            "seq_lengths": seq_lengths,
            "return_carry": self.return_carry if return_carry is None else return_carry,
            "time_major": self.time_major if time_major is None else time_major,
            "reverse": self.reverse if reverse is None else reverse,
            "keep_order": self.keep_order if keep_order is None else keep_order,
        }
        if self._may_be_one_operation(x):
            axis = 0 if settings["time_major"] else x.ndim - 2
            if initial_carry is None:
                stream = rngs.carry.fork() if isinstance(rngs, nnx.Rngs) else rngs
                shape = (*x.shape[:axis], *x.shape[axis + 1 :])
                initial_carry = self.cell.initialize_carry(shape, stream or self.rngs)
            found = self._one_operation(x, initial_carry, axis, **settings)
            if found is not None:
                return found
        return super().__call__(inputs, **given(initial_carry=initial_carry, rngs=rngs, **settings))

    def _may_be_one_operation(self, x: Any) -> bool:
        """Whether nothing but arrays and the cell's own choices can speak against it."""
        return (
            type(self.cell) in _CELLS
            and self.state_axes == _CARRIED
            and self.broadcast_rngs is None
            and isinstance(x, jax.Array)
            and x.ndim >= 2
        )

    def _one_operation(
        self,
        x: jax.Array,
        carry: Any,
        axis: int,
        *,
        seq_lengths: Any,
        return_carry: bool,
        time_major: bool,
        reverse: bool,
        keep_order: bool,
    ) -> Any:
        """What the layer returns; None where nnx is to compute."""

        def flipped(a: jax.Array) -> jax.Array:
            return flip_sequences(a, seq_lengths, num_batch_dims=x.ndim - 2, time_major=time_major)

        steps = jnp.moveaxis(flipped(x) if reverse else x, axis, -2)
        cell: Any = self.cell
        found = cell._over_time(carry, steps, self.unroll)
        if found is None:
            return None
        carries, y = found
        y = jnp.moveaxis(y, -2, axis)
        y = flipped(y) if reverse and keep_order else y
        if not return_carry:
            return y
        return jax.tree.map(lambda s: _last(s, seq_lengths), carries), y


def _last(states: jax.Array, seq_lengths: Any) -> jax.Array:
    """The state after the last step of each sequence, of states of shape (..., T, features).

    A sequence without a step has the state after the last step of all, as in nnx.
    """
    if seq_lengths is None:
        return states[..., -1, :]
    last = jnp.broadcast_to(jnp.asarray(seq_lengths) - 1, states.shape[:-2])
    return jnp.take_along_axis(states, last[..., None, None], axis=-2, mode="clip")[..., 0, :]
