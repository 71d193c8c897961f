"""Training a network beside its control, in which no gradient passes through the blocks.

In the control only the layer that reads the blocks learns, from the features of random blocks. How
far the network is ahead of it is what the gradient through its blocks is worth.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flax_customgrad.command.digits import data
from flax_customgrad.command.digits.blocks import AuxiliaryLoss, GradientGate
from flax_customgrad.command.digits.fit import fit

BuildNetwork = Callable[[nnx.Rngs], nnx.Module]
"""Makes a network from pixels, with blocks in it, to a number for each class."""


class ControlledResult(NamedTuple):
    """The shares of test images that were classified correctly, one for each seed.

    Attributes:
        accuracy: of the network.
        control: of the network whose blocks let no gradient through.
    """

    accuracy: np.ndarray
    control: np.ndarray

    @property
    def gain(self) -> float:
        """How many points the network is ahead of its control, in the mean."""
        return float(100 * (self.accuracy.mean() - self.control.mean()))


def train_with_control(
    build: BuildNetwork, seeds: int, steps: int, *, vmap_seeds: bool = True
) -> ControlledResult:
    """Trains a network and its control, for some seeds.

    Args:
        build: makes the network.
        seeds: how many seeds; each splits the data anew.
        steps: how many steps of 64 images.
        vmap_seeds: whether all are trained in one program. Where a backward writes state, train
            them one after another.
    """
    train, test = data.load_seeds(seeds)
    gates = jnp.array([1.0, 0.0])

    def train_one(seed: Any, gate: Any, train: data.Batch, test: data.Batch) -> jax.Array:
        rngs = nnx.Rngs(jax.random.key(seed))
        network = build(rngs)
        _set_gates(network, gate)

        def accuracy(key: jax.Array) -> jax.Array:
            return _accuracy(fit(network, _loss, train, steps, key), test)

        return accuracy(rngs()) if vmap_seeds else jax.jit(accuracy)(rngs())

    if vmap_seeds:
        both = jax.vmap(train_one, (None, 0, None, None))
        accuracy = jax.jit(jax.vmap(both, (0, None, 0, 0)))(jnp.arange(seeds), gates, train, test)
    else:
        splits = [jax.tree.map(lambda a, n=n: a[n], (train, test)) for n in range(seeds)]
        accuracy = [
            [train_one(seed, gate, *split) for gate in gates] for seed, split in enumerate(splits)
        ]
    accuracy = np.asarray(accuracy)
    return ControlledResult(accuracy[:, 0], accuracy[:, 1])


def _loss(network: nnx.Module, batch: data.Batch) -> jax.Array:
    logits = network(data.flatten(batch.images))  # type: ignore[operator]
    auxiliary = sum(v[...] for _, v in nnx.to_flat_state(nnx.state(network, AuxiliaryLoss)))
    errors = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return errors.mean() + auxiliary


def _accuracy(network: nnx.Module, test: data.Batch) -> jax.Array:
    """The share of images that a network classifies correctly."""
    network.eval()
    logits = network(data.flatten(test.images))  # type: ignore[operator]
    return (logits.argmax(-1) == test.labels).mean()


def _set_gates(network: nnx.Module, value: jax.Array) -> None:
    state = nnx.state(network, GradientGate)
    nnx.update(network, jax.tree.map(lambda _: value, state))
