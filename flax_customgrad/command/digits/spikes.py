"""Digits as spikes over time, and blocks of spiking neurons that hand them on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.command.digits.probe import Block

STEPS = 25
"""For how many steps an image is shown."""


class SpikeTrains(nnx.Module):
    """Images as spikes: in each step a pixel fires with the probability of its intensity."""

    def __init__(self, rngs: nnx.Rngs):
        self.rngs = rngs["spikes"].fork()

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Spikes of shape (STEPS, n, pixels), 0 or 1, from intensities of shape (n, pixels)."""
        fired = jax.random.bernoulli(self.rngs(), pixels, (STEPS, *pixels.shape))
        return fired.astype(jnp.float32)


class Spiking(Block):
    """A linear layer and spiking neurons.

    Args:
        neurons: makes the cell from the number of neurons.
        in_features: how many neurons come in.
        out_features: how many go out.
        rngs: the streams.
    """

    def __init__(
        self,
        neurons: Callable[[int], nnx.RNNCellBase],
        in_features: int,
        out_features: int,
        rngs: nnx.Rngs,
    ):
        super().__init__()
        self.linear = nnx.Linear(in_features, out_features, rngs=rngs)
        self.neurons = nnx.RNN(neurons(out_features), time_major=True, rngs=rngs)

    def __call__(self, spikes: jax.Array) -> jax.Array:
        """Spikes of shape (steps, n, out_features) from those of (steps, n, in_features)."""
        return self.let_through(self.neurons(self.linear(spikes)))  # type: ignore[arg-type]


def over_time(*layers: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
    """A chain of spiking blocks whose last layer reads how often each neuron fires."""
    *hidden, readout = layers
    return nnx.Sequential(SpikeTrains(rngs), *hidden, _rate, readout)


def _rate(spikes: jax.Array) -> jax.Array:
    return spikes.mean(0)
