"""`SpikingCell`: the base of cells of spiking neurons, with their arguments and their state.

A cell is one step in time of a layer of neurons without weights, for `nnx.RNN` or `lax.scan`: put
a `Linear` in front of it. Its decays and its threshold are Variables, or Params where they are
learned, of the shape that they were given: a number for all neurons, an array for one each.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.estimators.rounding.rounding import clip_ste
from flax_customgrad.estimators.spiking import spike_surrogates as surrogate
from flax_customgrad.estimators.spiking.fire import Reset, fire
from flax_customgrad.estimators.spiking.leak import leak
from flax_customgrad.layers.recurrent.initial_carry import initial_carry
from flax_customgrad.numerics.argument_checks import check_positive, check_word
from flax_customgrad.numerics.broadcasting import broadcasts
from flax_customgrad.numerics.dtypes import as_array, is_supported_float

Spike = Callable[[jax.Array], jax.Array]
"""A step with a surrogate gradient: 1 where its argument is positive, else 0."""


class SpikingCell(nnx.RNNCellBase):
    """Neurons that leak, fire and reset; the base of `Leaky` and `LIF`.

    Args:
        features: how many neurons, or the shape in which they are arranged: the last axes of the
            inputs.
        threshold: the membrane potential above which a neuron fires.
        reset: what a spike does to the membrane.
        spike: the surrogate gradient.
        reset_gradient: whether the spike in the reset is differentiated.
        learn_decay: whether the decays are parameters.
        learn_threshold: whether the threshold is a parameter.
        param_dtype: dtype of decays and threshold, and of the state that `initialize_carry` makes.

    Raises:
        ValueError: `features` is below 1, `threshold` is not positive or does not broadcast to the
            neurons, or `reset` is not "subtract", "zero" or "none".
        TypeError: `spike` is not a function.
    """

    def __init__(
        self,
        features: int | Sequence[int],
        *,
        threshold: Any = 1.0,
        reset: Reset = "subtract",
        spike: Spike = surrogate.fast_sigmoid,
        reset_gradient: bool = False,
        learn_decay: bool = False,
        learn_threshold: bool = False,
        param_dtype: Any = jnp.float32,
    ):
        name = type(self).__name__
        self.features = _shape(name, features)
        check_word(name, "reset", reset, get_args(Reset))
        if not callable(spike):
            raise TypeError(
                f"{name}: spike={spike!r} is no function; write surrogate.atan, or "
                "functools.partial(surrogate.atan, slope=4.0)"
            )
        self.reset: Reset = reset
        self.spike = spike
        self.reset_gradient = reset_gradient
        self.learn_decay = learn_decay
        self.param_dtype = param_dtype
        threshold = check_positive(name, "threshold", threshold)
        self.threshold = self._variable("threshold", threshold, learn_threshold)

    @property
    def num_feature_axes(self) -> int:
        """How many axes the neurons are arranged in; `nnx.RNN` reads it."""
        return len(self.features)

    def _state(
        self,
        input_shape: Sequence[int],
        rngs: nnx.Rngs | nnx.RngStream | None,
        carry_init: nnx.Initializer | None,
    ) -> jax.Array:
        """One state at rest, 0, or as `carry_init` says."""
        shape = self._checked(tuple(input_shape))
        return initial_carry(type(self).__name__, shape, self.param_dtype, rngs, carry_init)

    def _inputs(self, x: Any, state: jax.Array) -> jax.Array:
        """The inputs, checked; integers and truth values in the dtype of the state."""
        x = jnp.asarray(as_array(x))
        self._checked(x.shape)
        if state.shape != x.shape:
            raise ValueError(
                f"{type(self).__name__}: the carry has shape {state.shape}, the inputs have "
                f"{x.shape}: make it with initialize_carry(inputs.shape)"
            )
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x.astype(state.dtype)
        if not is_supported_float(x):
            raise TypeError(
                f"{type(self).__name__} takes float16, bfloat16, float32 and float64, got "
                f"{x.dtype}: cast the inputs with x.astype(...) first"
            )
        return x

    def _leak(self, decay: nnx.Variable, state: jax.Array, x: jax.Array) -> jax.Array:
        """A state after a step. The gradient passes the clip, so a decay beyond 1 can come back."""
        return leak(clip_ste(decay[...], 0, 1), state, x, self.learn_decay)

    def _fire(self, v: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The membrane after its reset, and the spikes in the dtype of the inputs."""
        spike = self.spike
        if isinstance(spike, functools.partial):
            # Makes its arrays arguments: a slope that is annealed is traced.
            spike = jax.tree_util.Partial(spike.func, *spike.args, **spike.keywords)
        u, s = fire(self.threshold[...], v, spike, self.reset, self.reset_gradient)
        return u, s.astype(dtype)

    def _decay(self, name: str, value: Any) -> nnx.Variable:
        """The Variable of a decay; from 0 to 1."""
        known = not is_traced(value)
        if known and not np.all((np.asarray(value) >= 0) & (np.asarray(value) <= 1)):
            raise ValueError(f"{type(self).__name__}: {name}={value!r} must be from 0 to 1")
        return self._variable(name, value, self.learn_decay)

    def _variable(self, name: str, value: Any, learned: bool) -> nnx.Variable:
        value = jnp.asarray(value, self.param_dtype)
        if not broadcasts(value.shape, self.features):
            raise ValueError(
                f"{type(self).__name__}: {name} of shape {value.shape} does not broadcast to the "
                f"neurons, {self.features}"
            )
        return (nnx.Param if learned else nnx.Variable)(value)

    def _checked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[-len(self.features) :] != self.features:
            raise ValueError(
                f"{type(self).__name__}: inputs of shape {shape} do not end in the neurons, "
                f"{self.features}"
            )
        return shape


def _shape(layer: str, features: int | Sequence[int]) -> tuple[int, ...]:
    shape = tuple(features) if isinstance(features, Sequence) else (operator.index(features),)
    if not shape or min(shape) < 1:
        raise ValueError(f"{layer}: features={features!r} must be at least 1")
    return shape
