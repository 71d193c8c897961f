"""What `train` trains on: a network, the data, and how it is called."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx


class Examples(Protocol):
    """A tuple of arrays along whose first axis the examples are."""

    @property
    def labels(self) -> np.ndarray:
        """The classes of each example, int32 of shape (n, ...)."""
        ...


E = TypeVar("E", bound=Examples)


class Task(NamedTuple):
    """A network and its data.

    Attributes:
        name: its name, as on the command line.
        title: the same for people.
        load: the examples to train and to test on, of a seed.
        network: makes the network, whose layers are all of flax.nnx.
        logits: calls the network on examples, and says whether that is training.
        batch: how many examples a step takes.
    """

    name: str
    title: str
    load: Callable[[int], tuple[Any, Any]]
    network: Callable[[nnx.Rngs], nnx.Module]
    logits: Callable[[Any, Any, bool], jax.Array]
    batch: int


def batches(examples: E, steps: int, seed: int, size: int) -> Iterator[E]:
    """Draws batches, in a new order for each pass over the examples.

    Args:
        examples: what to draw from, at least `size` of them.
        steps: how many batches.
        seed: of the order.
        size: how many examples a batch has.
    """
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = rng.permutation(len(examples.labels))
        chosen, order = order[:size], order[size:]
        yield jax.tree.map(lambda a, chosen=chosen: a[chosen], examples)
