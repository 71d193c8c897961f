"""The digits as spikes, and a network of spiking neurons that reads them."""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from flax_customgrad.linear.linear import Linear
from flax_customgrad.spiking.leaky import Leaky

STEPS = 25
"""For how many steps an image is shown."""

_PIXELS, _NEURONS, _CLASSES = 64, 128, 10


def spike_trains(images: ArrayLike, key: jax.Array) -> jax.Array:
    """Images as spikes: in each step a pixel fires with the probability of its intensity.

    Args:
        images: array of shape (n, 8, 8, 1), from 0 to 1.
        key: a key of `jax.random`.

    Returns:
        float32 of shape (STEPS, n, 64), of 0 and 1.
    """
    rates = einops.rearrange(jnp.asarray(images), "n h w 1 -> n (h w)")
    fired = jax.random.bernoulli(key, rates, (STEPS, *rates.shape))
    return fired.astype(jnp.float32)


class SpikingNetwork(nnx.Module):
    """From the spikes of a digit's pixels to a logit for each of ten classes.

    Two layers of spiking neurons, and a linear layer that reads how often those of the second fire.

    Args:
        rngs: the streams.
        neurons: makes the cell of a layer from the number of its neurons.
    """

    def __init__(self, rngs: nnx.Rngs, neurons: Callable[[int], nnx.RNNCellBase] = Leaky):
        self.hidden = nnx.Sequential(
            Linear(_PIXELS, _NEURONS, rngs=rngs),
            nnx.RNN(neurons(_NEURONS), time_major=True),
            Linear(_NEURONS, _NEURONS, rngs=rngs),
            nnx.RNN(neurons(_NEURONS), time_major=True),
        )
        self.readout = Linear(_NEURONS, _CLASSES, rngs=rngs)

    def __call__(self, spikes: jax.Array) -> jax.Array:
        """Applies the network.

        Args:
            spikes: array of shape (steps, n, 64).

        Returns:
            Logits of shape (n, 10).
        """
        return self.readout(self.hidden(spikes).mean(0))
