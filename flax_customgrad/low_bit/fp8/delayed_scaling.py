"""Delayed scaling: the scales of a step are those that the last steps asked for, arXiv:2209.05433.

Of x, the kernel and g, in this order, a layer remembers

    scale    s' = max(history) / (max 2^-margin),  or the last s where that is 0
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
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.contract.backward_state import BackwardState
from flax_customgrad.low_bit.fp8.fp8_formats import E4M3, E5M2, scale_of

# Of x, of the kernel, of g.
_MAX = np.array([E4M3.max, E4M3.max, E5M2.max], np.float32)
_NO_STEP = -1


class Remembered(NamedTuple):
    """What an operation is handed of a `DelayedScaling`."""

    amax_history: BackwardState
    scale: BackwardState
    steps: BackwardState


class ScaleSnapshot(NamedTuple):
    """What a forward takes from the histories and its backward goes by.

    Attributes:
        scales: of x, of the kernel and of g, float32 of shape (3,).
        step: the step that is taken if no one takes it before, int32; None for current scaling.
    """

    scales: jax.Array
    step: jax.Array | None


def read_scales(remembered: Remembered, margin: int) -> ScaleSnapshot:
    """The scales for a forward and its backward.

    Args:
        remembered: the state.
        margin: how many halvings of a range are left unused.
    """
    taken, allowed = remembered.steps[...]
    old = remembered.scale[...]
    begins = (allowed < 0) | (taken < allowed)
    asked_for = scale_of(jnp.max(remembered.amax_history[...], axis=1), _MAX, old, margin)
    return ScaleSnapshot(jnp.where(begins, asked_for, old), jnp.where(begins, taken, _NO_STEP))


def record_amax(remembered: Remembered, snapshot: ScaleSnapshot, amaxes: jax.Array) -> None:
    """Writes what a backward has seen.

    Args:
        remembered: the state.
        snapshot: what its forward went by.
        amaxes: of x, of the kernel and of g, float of shape (3,).
    """
    taken, allowed = remembered.steps[...]
    first = snapshot.step == taken
    history = remembered.amax_history[...]
    amaxes = jnp.minimum(amaxes, jnp.finfo(history.dtype).max).astype(history.dtype)
    moved = jnp.roll(history, -1, axis=1).at[:, 0].set(0)
    remembered.amax_history[...] = jnp.where(first, moved, history).at[:, 0].max(amaxes)
    remembered.scale[...] = jnp.where(first, snapshot.scales, remembered.scale[...])
    remembered.steps[...] = jnp.stack([taken + first, allowed])


class DelayedScaling(nnx.Module):
    """The histories and scales of a layer; `Fp8Linear` and `Fp8Einsum` hold one.

    Args:
        layer: the name of the layer's class, for errors.
        history: how many steps are remembered.

    Attributes:
        amax_history: a `BackwardState`, float32 of shape (3, history); the rows are of x, of the
            kernel and of the gradient of the output. Zeros at first.
        scale: a `BackwardState`, float32 of shape (3,). Ones at first.
        steps: a `BackwardState`, two int32: steps taken, and how many may be, or -1.
    """

    def __init__(self, layer: str, history: int):
        def state(name: str, value: Any) -> BackwardState:
            return BackwardState(value, name=f"{layer}'s {name}")

        self.amax_history = state("amax_history", np.zeros((3, history), np.float32))
        self.scale = state("scale", np.ones(3, np.float32))
        self.steps = state("steps", np.array([0, -1], np.int32))

    def remembered(self) -> Remembered:
        """The states, for an operation."""
        return Remembered(self.amax_history, self.scale, self.steps)


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
            taken, _ = node.steps[...]
            node.steps[...] = jnp.stack([taken, taken + 1])
