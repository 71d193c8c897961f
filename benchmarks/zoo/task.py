"""What a model is trained on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Task(NamedTuple):
    """A model, and what its step and its forward take.

    Attributes:
        model: the model, called with one array.
        x: the array.
        loss: takes what the model returns; its value is a float32 scalar.
    """

    model: nnx.Module
    x: jax.Array
    loss: Callable[[Any], jax.Array]


def images(batch: int, pixels: int) -> jax.Array:
    """Square images of noise.

    Returns:
        Array of shape (batch, pixels, pixels, 3), float32.
    """
    return jax.random.normal(jax.random.key(0), (batch, pixels, pixels, 3))


def integers(*shape: int, below: int) -> jax.Array:
    """Labels or tokens at random.

    Returns:
        Array of that shape, int32.
    """
    return jax.random.randint(jax.random.key(1), shape, 0, below)


def cross_entropy(labels: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The mean cross-entropy of labels.

    Args:
        labels: array of shape (...), int32.

    Returns:
        A function of logits of shape (..., classes).
    """

    def loss(logits: jax.Array) -> jax.Array:
        log_p = nnx.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], axis=-1))

    return loss
