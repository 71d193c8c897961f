"""Delayed scaling of 8-bit floats: the scales of a step are those that the last steps asked for.

Of x, the kernel and g, in this order, a layer remembers

    scale    max(history) / (max 2^-margin),  or the last scale where that is 0
    history  amax of the last steps: the newest in column 0, the others behind it from the right

so that nothing has to be known of an array before it is quantized. The backward pass writes both.
The values are those of flax.linen.fp8_ops to the bit, in its order, with two differences: an amax
is that of the finite elements, where an infinite one would be remembered for as long as the history
is, and a last scale is kept as it is rather than inverted twice.

    A step     is what gradients share that were computed from the same histories: a layer that is
               called twice reads the same scales twice, and its histories take the larger amax. So
               does flax.linen, by a dtype whose sum is the maximum.
    begin_step makes a step of every gradient until it is called again. Micro-batches whose
               gradients are accumulated then leave the histories that the whole batch leaves.

Two counters say which gradients share a step. `steps` is [taken, allowed]: the first gradient of a
step, of those whose forward saw the same `taken`, moves the histories along and counts it; others
add to its column. Beyond `allowed`, where that is not negative, no step is taken.

Source: arXiv:2209.05433
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.contract.backward_state import BackwardState
from flax_customgrad.low_bit.fp8.fp8_codes import (
    FORWARD_DTYPE,
    GRADIENT_DTYPE,
    largest_of,
    scale_from_amax,
)

# Of x, of the kernel, of g.
_DTYPES = (FORWARD_DTYPE, FORWARD_DTYPE, GRADIENT_DTYPE)
_NO_STEP = -1


class DelayedState(NamedTuple):
    """What an operation is handed of a `DelayedScaling`.

    Attributes:
        amax_history: of one layer, or of a stack of layers with one more axis in front.
        scale: likewise.
        steps: likewise.
        place: which layer of the stack it is, int32 without axes; None for one layer.
    """

    amax_history: BackwardState
    scale: BackwardState
    steps: BackwardState
    place: jax.Array | None

    @property
    def own(self) -> Any:
        """What reads and writes the part of this layer."""
        return ... if self.place is None else self.place


class ScaleSnapshot(NamedTuple):
    """The scales that a forward read, which its backward goes by.

    Attributes:
        scales: of x, of the kernel and of g, float32 of shape (3,).
        step: the step that is taken if no one takes it before, int32; None for current scaling.
    """

    scales: jax.Array
    step: jax.Array | None


def read_scales(delayed: DelayedState, margin: int) -> ScaleSnapshot:
    """The scales for a forward and its backward.

    Args:
        delayed: the state.
        margin: how many halvings of a range are left unused.
    """
    taken, allowed = delayed.steps[delayed.own]
    old = delayed.scale[delayed.own]
    begins = (allowed < 0) | (taken < allowed)
    amax = jnp.max(delayed.amax_history[delayed.own], axis=1)
    largest = np.array([largest_of(dtype) for dtype in _DTYPES], np.float32)
    new = scale_from_amax(amax, largest, old, margin)
    return ScaleSnapshot(jnp.where(begins, new, old), jnp.where(begins, taken, _NO_STEP))


def record_amax(delayed: DelayedState, snapshot: ScaleSnapshot, amax: jax.Array) -> None:
    """Writes the maxima that a backward has seen into the histories, and the scales it used.

    Args:
        delayed: the state.
        snapshot: the scales that its forward read.
        amax: of x, of the kernel and of g, float of shape (3,).
    """
    own = delayed.own
    steps, scale, history = (s[own] for s in (delayed.steps, delayed.scale, delayed.amax_history))
    dims = chex.Dimensions(T=history.shape[-1])
    chex.assert_shape(history, dims["3T"])
    chex.assert_shape([scale, snapshot.scales, amax], (3,))
    chex.assert_shape(steps, (2,))
    taken, allowed = steps
    first = snapshot.step == taken
    amax = jnp.minimum(amax, jnp.finfo(history.dtype).max).astype(history.dtype)
    moved = jnp.roll(history, -1, axis=1).at[:, 0].set(0)
    delayed.amax_history[own] = jnp.where(first, moved, history).at[:, 0].max(amax)
    delayed.scale[own] = jnp.where(first, snapshot.scales, scale)
    delayed.steps[own] = jnp.stack([taken + first, allowed])


class StackPlace(nnx.Variable):
    """The places of stacked layers in a state that they share: a scan hands each its own."""


class DelayedScaling(nnx.Module):
    """The histories and scales of a layer; `Fp8Linear` and `Fp8Einsum` hold one.

    Those of stacked layers have one more axis in front, and `place` says which is whose.

    Args:
        layer: the name of the layer's class, for errors.
        history: how many steps are remembered.
        axes: the sizes of the axes along which layers are stacked; () for one layer.

    Attributes:
        amax_history: a `BackwardState`, float32 of shape (3, history); the rows are of x, of the
            kernel and of the gradient of the output. Zeros at first.
        scale: a `BackwardState`, float32 of shape (3,). Ones at first.
        steps: a `BackwardState`, two int32: steps taken, and how many may be, or -1.
        place: a `StackPlace`, float32 with the axes of the stack; None for one layer.
    """

    def __init__(self, layer: str, history: int, axes: tuple[int, ...] = ()):
        self.layer = layer
        self.history = history
        self.place: StackPlace | None = nnx.data(None)
        self._set_states(())
        self.stack(axes)

    def stack(self, axes: tuple[int, ...]) -> None:
        """Gives each layer of a stack states of its own, where they have one together.

        Args:
            axes: the sizes of the axes of the stack; () for one layer.
        """
        if axes and self.place is None:
            # Floating: `nnx.grad` may differentiate every Variable.
            places = np.arange(math.prod(axes), dtype=np.float32).reshape(axes)
            self.place = StackPlace(jnp.asarray(places))
            self._set_states((math.prod(axes),))

    def states(self) -> DelayedState:
        """The states, for an operation."""
        place = None if self.place is None else self.place[...].astype(jnp.int32)
        return DelayedState(self.amax_history, self.scale, self.steps, place)

    def scales_to_come(self, index: tuple[int, ...], margin: int) -> jax.Array:
        """The scales of the next step, of x, of the kernel and of g: float32 of shape (3,).

        Args:
            index: which layer of a stack; () for one layer.
            margin: how many halvings of a range are left unused.
        """
        if not self.scale.has_value:
            return jnp.ones(3, jnp.float32)  # An abstract layer.
        states = self.states()
        if states.place is not None:
            states = states._replace(place=states.place[index])
        return read_scales(states, margin).scales

    def _set_states(self, axes: tuple[int, ...]) -> None:
        def state(name: str, value: np.ndarray) -> BackwardState:
            value = np.broadcast_to(value, (*axes, *value.shape))
            return BackwardState(value, name=f"{self.layer}'s {name}")

        self.amax_history = state("amax_history", np.zeros((3, self.history), np.float32))
        self.scale = state("scale", np.ones(3, np.float32))
        self.steps = state("steps", np.array([0, -1], np.int32))


def begin_step(model: Any) -> None:
    """Makes one step of every gradient from here to the next call, for delayed scaling.

    Without it each gradient is a step: right where an optimizer steps after each. Where it steps
    after several, call this before the first of them, inside or outside of a compiled function::

        fcg.begin_step(model)
        for micro_batch in batch:
            grads = add(grads, gradient(model, micro_batch))
        optimizer.update(model, grads)

    Scales then stay the same throughout, and each history takes the maximum over the micro-batches:
    that of the whole batch. It is also for layers that are shared inside of `nnx.remat`, whose
    forward runs again after a backward has written. Once called, it has to be called for each step.

    Args:
        model: a Module, or a tree of them; layers without delayed scaling are passed over.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> model = fcg.Fp8Linear(4, 3, history=3, rngs=nnx.Rngs(0))
        >>> gradient = nnx.jit(nnx.grad(lambda model, x: model(x).sum()))
        >>> fcg.begin_step(model)
        >>> for micro_batch in (jnp.ones((2, 4)), 2 * jnp.ones((2, 4))):
        ...     grads = gradient(model, micro_batch)
        >>> model.delayed.amax_history[0]
        Array([2., 0., 0.], dtype=float32)
    """
    for _, node in nnx.iter_graph(model, graph=True):
        if isinstance(node, DelayedScaling):
            taken = node.steps[...][..., 0]
            node.steps[...] = jnp.stack([taken, taken + 1], -1)
