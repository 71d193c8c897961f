"""Digits as spike trains, and blocks of spiking neurons."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.command.digits.blocks import Block

STEPS = 25
"""For how many steps an image is shown."""


class SpikeTrains(nnx.Module):
    """Encodes images as spikes: in each step a pixel fires with its intensity as probability."""

    def __init__(self, rngs: nnx.Rngs):
        self.rngs = rngs["spikes"].fork()

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Draws spikes of shape (STEPS, n, pixels), 0 or 1, from intensities of (n, pixels)."""
        fired = jax.random.bernoulli(self.rngs(), pixels, (STEPS, *pixels.shape))
        return fired.astype(jnp.float32)


class SpikingBlock(Block):
    """A linear layer and spiking neurons.

    Args:
        neurons: makes the cell from the number of neurons.
        in_features: how many features come in.
        out_features: how many neurons there are.
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
        """Maps spikes of shape (steps, n, in_features) to spikes of (steps, n, out_features)."""
        return self.gate_gradient(self.neurons(self.linear(spikes)))  # type: ignore[arg-type]


def over_time(*layers: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
    """A chain of spiking blocks whose last layer reads how often each neuron fires."""
    *hidden, readout = layers
    return nnx.Sequential(SpikeTrains(rngs), *hidden, _rate, readout)


def _rate(spikes: jax.Array) -> jax.Array:
    return spikes.mean(0)
