"""The task `text`: a decoder that predicts the next byte of Python source."""

import jax
import jax.numpy as jnp

from flax_customgrad.command.side_by_side.task import Task
from flax_customgrad.command.text import excerpts
from flax_customgrad.command.text.decoder import Decoder


def _logits(network: Decoder, batch: excerpts.Text, training: bool) -> jax.Array:
    return network(jnp.asarray(batch.tokens))


TASK = Task("text", "Python source, byte by byte", excerpts.load, Decoder, _logits, batch=16)
