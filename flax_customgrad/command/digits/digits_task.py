"""The task `digits`: a convolutional network that classifies handwritten digits."""

import jax
import jax.numpy as jnp

from flax_customgrad.command.digits import data
from flax_customgrad.command.digits.network import Network
from flax_customgrad.command.side_by_side.task import Task


def _logits(network: Network, batch: data.Batch, training: bool) -> jax.Array:
    return network(jnp.asarray(batch.images), training=training)


TASK = Task("digits", "Handwritten digits", data.load, Network, _logits, batch=64)
