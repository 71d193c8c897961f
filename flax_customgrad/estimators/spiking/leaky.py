"""Leaky: a neuron that integrates its inputs, leaks, fires and resets.

    v  = a u + x            leak:  a the decay, u the membrane potential of the step before
    s  = 1 where v > theta, else 0
    u  = v - theta s        fire:  or (1 - s) v, or v, as the reset says

It is composed of two operations, `leak` and `fire`, each with a backward of its own. Of a scan
over time v is kept alone; u as well where the decay is learned. The reset is part of the step in
which the neuron fired. That of snntorch's Leaky comes a step later by default: with reset "zero"
the same spikes; with "subtract" it takes theta off after the leak, `a v - theta s + x` instead of
`a (v - theta s) + x`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.estimators.spiking.cell import Spike, SpikingCell
from flax_customgrad.estimators.spiking.fire import Reset
from flax_customgrad.estimators.spiking.spike_surrogates import fast_sigmoid


class Leaky(SpikingCell):
    """A cell of leaky integrate-and-fire neurons, first order: a membrane and no synapse.

    Args:
        features: how many neurons, or the shape in which they are arranged: the last axes of the
            inputs.
        decay: a, what a step leaves of the membrane potential, from 0 to 1: a number, or an array
            that broadcasts to the neurons. exp(-1 / tau) for a time constant of tau steps.
        learn_decay: whether the decay is a Param. It is clipped to [0, 1] where it is used, and the
            gradient passes the clip, so a decay that an optimizer pushes beyond can come back.
        threshold: theta, above which a neuron fires: a positive number or array, likewise.
        learn_threshold: whether the threshold is a Param.
        reset: "subtract" takes theta off the membrane that fired, "zero" sets it to 0, "none"
            leaves it as it is.
        reset_gradient: whether the spike in the reset is differentiated.
        spike: the surrogate gradient, a function of v - theta; `functools.partial` gives one its
            slope, which may be traced.
        param_dtype: dtype of decay and threshold, and of the state that `initialize_carry` makes.

    Raises:
        ValueError: `decay` is not within [0, 1], `threshold` is not positive, `features` is below
            1, or `reset` is not "subtract", "zero" or "none".
        TypeError: `spike` is not a function.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> cell = fcg.Leaky(3, decay=0.5)
        >>> spikes = nnx.RNN(cell, time_major=True)(jnp.full((4, 1, 3), 0.75))
        >>> spikes[:, 0, 0]
        Array([0., 1., 0., 1.], dtype=float32)
    """

    def __init__(
        self,
        features: int | Sequence[int],
        *,
        decay: Any = 0.9,
        threshold: Any = 1.0,
        reset: Reset = "subtract",
        spike: Spike = fast_sigmoid,
        reset_gradient: bool = False,
        learn_decay: bool = False,
        learn_threshold: bool = False,
        param_dtype: Any = jnp.float32,
    ):
        super().__init__(
            features,
            threshold=threshold,
            reset=reset,
            spike=spike,
            reset_gradient=reset_gradient,
            learn_decay=learn_decay,
            learn_threshold=learn_threshold,
            param_dtype=param_dtype,
        )
        self.decay = self._decay("decay", decay)

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: nnx.Initializer | None = None,
    ) -> jax.Array:
        """The membrane potential to start with: 0.

        Args:
            input_shape: the shape of the inputs of one step, (..., *features).
            rngs: random numbers for `carry_init`.
            carry_init: an initializer to use instead.

        Returns:
            Array of that shape.
        """
        return self._state(input_shape, rngs, carry_init)

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step in time.

        Args:
            carry: the membrane potential u, of shape (..., *features), float.
            inputs: x, of that shape.

        Returns:
            The membrane potential after the reset, like carry, and the spikes, 0 and 1, of that
            shape and in the dtype of the inputs (that of carry for integers).

        Raises:
            ValueError: the inputs do not end in `features`, or carry and inputs differ in shape.
            TypeError: the inputs are complex, or an 8-bit float.
        """
        x = self._inputs(inputs, carry)
        return self._fire(self._leak(self.decay, carry, x), x.dtype)
