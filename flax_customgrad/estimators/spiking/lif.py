"""LIF: a neuron with a synapse, whose current charges the membrane.

    i  = b i + x            leak:  b = exp(-1 / tau_syn), i the current of the step before
    v  = a u + i            leak:  a = exp(-1 / tau_mem), u the membrane of the step before
    s  = 1 where v > theta, else 0
    u  = v - theta s        fire:  or (1 - s) v, or v, as the reset says

It is composed of `leak`, twice, and `fire`, each with a backward of its own.

An input reaches the membrane in its own step, unscaled, as in snntorch's Synaptic and the CuBaLIF
of spyx, and the current outlives the reset. Of a scan over time v is kept alone; i and u as well
where the decays are learned. snntorch resets a step later by default, and its reset to zero then
also drops the input of that step.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.estimators.spiking.cell import Spike, SpikingCell
from flax_customgrad.estimators.spiking.fire import Reset
from flax_customgrad.estimators.spiking.spike_surrogates import fast_sigmoid
from flax_customgrad.numerics.argument_checks import check_positive

Carry = tuple[jax.Array, jax.Array]
"""The synaptic current and the membrane potential."""


class LIF(SpikingCell):
    """A cell of leaky integrate-and-fire neurons, second order: a synaptic current and a membrane.

    Args:
        features: how many neurons, or the shape in which they are arranged: the last axes of the
            inputs.
        tau_syn: time constant of the current, in steps: a positive number, or an array that
            broadcasts to the neurons. It is held as `current_decay`, exp(-1 / tau_syn).
        tau_mem: time constant of the membrane, likewise; held as `membrane_decay`.
        threshold: theta, above which a neuron fires: a positive number or array, likewise.
        reset: "subtract" takes theta off the membrane that fired, "zero" sets it to 0, "none"
            leaves it as it is.
        spike: the surrogate gradient, a function of v - theta; `functools.partial` gives one its
            slope, which may be traced.
        reset_gradient: whether the spike in the reset is differentiated.
        learn_decay: whether both decays are Params. They are clipped to [0, 1] where they are used,
            and the gradient passes the clip, so a decay that an optimizer pushes beyond can come
            back.
        learn_threshold: whether the threshold is a Param.
        param_dtype: dtype of decays and threshold, and of the state that `initialize_carry` makes.

    Raises:
        ValueError: a time constant or `threshold` is not positive, `features` is below 1, or
            `reset` is not "subtract", "zero" or "none".
        TypeError: `spike` is not a function.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> cell = fcg.LIF(3, tau_syn=2.0, tau_mem=4.0, reset="zero")
        >>> spikes = nnx.RNN(cell, time_major=True)(jnp.full((5, 1, 3), 0.4))
        >>> spikes[:, 0, 0]
        Array([0., 0., 1., 0., 1.], dtype=float32)
    """

    def __init__(
        self,
        features: int | Sequence[int],
        *,
        tau_syn: Any = 5.0,
        tau_mem: Any = 10.0,
        threshold: Any = 1.0,
        reset: Reset = "subtract",
        spike: Spike = fast_sigmoid,
        reset_gradient: bool = False,
        learn_decay: bool = False,
        learn_threshold: bool = False,
        param_dtype: Any = jnp.float32,
    ):
        current_decay = jnp.exp(-1 / jnp.asarray(check_positive("LIF", "tau_syn", tau_syn)))
        membrane_decay = jnp.exp(-1 / jnp.asarray(check_positive("LIF", "tau_mem", tau_mem)))
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
        self.current_decay = self._decay("current_decay", current_decay)
        self.membrane_decay = self._decay("membrane_decay", membrane_decay)

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: nnx.Initializer | None = None,
    ) -> Carry:
        """The current and the membrane potential to start with: 0.

        Args:
            input_shape: the shape of the inputs of one step, (..., *features).
            rngs: random numbers for `carry_init`.
            carry_init: an initializer to use instead.

        Returns:
            Two arrays of that shape.
        """
        current = self._state(input_shape, rngs, carry_init)
        return current, self._state(input_shape, rngs, carry_init)

    def __call__(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, jax.Array]:
        """One step in time.

        Args:
            carry: the current i and the membrane potential u, each of shape (..., *features),
                float.
            inputs: x, of that shape.

        Returns:
            The new current and the membrane potential after the reset, like carry, and the spikes,
            0 and 1, of that shape and in the dtype of the inputs (that of the current for
            integers).

        Raises:
            ValueError: the inputs do not end in `features`, or carry and inputs differ in shape.
            TypeError: the inputs are complex, or an 8-bit float.
        """
        current, membrane = carry
        x = self._inputs(inputs, current)
        current = self._leak(self.current_decay, current, x)
        v = self._leak(self.membrane_decay, membrane, self._inputs(current, membrane))
        membrane, spikes = self._fire(v, x.dtype)
        return (current, membrane), spikes
