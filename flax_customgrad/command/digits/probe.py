"""A network that learns as much as its blocks let through, and how accurate it becomes.

Its control is the same network with the gradient through the blocks set to zero: only the layer
that reads them learns, from what the random blocks happen to show.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flax_customgrad.command.digits import data
from flax_customgrad.command.digits.fit import fit
from flax_customgrad.estimators.rounding.sign import SteSign
from flax_customgrad.gradients.shaping.scale import gradient_scale
from flax_customgrad.layers.normalization.batch_norm import BatchNorm

WIDTH = 48
"""How many features a hidden block has: few, so that those of the control show little."""

CLASSES = 10
"""How many digits there are."""

PIXELS = 64
"""How many pixels an image has."""


class Switch(nnx.Variable):
    """1 where the gradient through the step passes, 0 in the control."""


class Loss(nnx.Variable):
    """What a block adds to the loss, such as the commitment to a codebook."""


class Block(nnx.Module):
    """A hidden block; `passes` and `loss` are its own, the layers are those of its kind."""

    def __init__(self):
        self.passes = Switch(jnp.ones(()))
        self.loss = Loss(jnp.zeros(()))

    def let_through(self, x: jax.Array) -> jax.Array:
        """x, whose gradient passes or does not."""
        return gradient_scale(x, self.passes[...])


class Activation(Block):
    """A linear layer, normalized, and a step of its features.

    Args:
        step: takes and returns an array of shape (n, out_features); or returns with it what to add
            to the loss.
        linear: the class of the layer.
        in_features: how many features come in.
        out_features: how many go out.
        rngs: the streams.
    """

    def __init__(
        self,
        step: Callable[[jax.Array], Any],
        linear: Callable[..., nnx.Module],
        in_features: int,
        out_features: int,
        rngs: nnx.Rngs,
    ):
        super().__init__()
        self.linear = linear(in_features, out_features, use_bias=False, rngs=rngs)
        self.norm = BatchNorm(out_features, momentum=0.9, rngs=rngs)
        self.step = step

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of shape (n, out_features) from those of shape (n, in_features)."""
        y = self.step(self.norm(self.linear(x)))  # type: ignore[operator]
        if isinstance(y, tuple):
            y, self.loss[...] = y
        return self.let_through(y)


class Weights(Block):
    """A step of the weights of a linear layer, and the sign of its features.

    Args:
        step: takes and returns an array of shape (in_features, out_features).
        in_features: how many features come in.
        out_features: how many go out.
        rngs: the streams.
    """

    def __init__(
        self,
        step: Callable[[jax.Array], jax.Array],
        in_features: int,
        out_features: int,
        rngs: nnx.Rngs,
    ):
        super().__init__()
        shape = (in_features, out_features)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape))
        # Without a scale and a bias, by which the control would learn after all.
        self.norm = BatchNorm(
            out_features, momentum=0.9, use_scale=False, use_bias=False, rngs=rngs
        )
        self.step = step
        self.sign = SteSign()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of shape (n, out_features) from those of shape (n, in_features)."""
        return self.sign(self.norm(x @ self.let_through(self.step(self.kernel[...]))))


Make = Callable[[int, int, nnx.Rngs], Block]
"""Makes a block from how many features come in and go out."""


Build = Callable[[nnx.Rngs], nnx.Module]
"""Makes a network of pixels with blocks in it, which returns a number for each class."""


class Outcome(NamedTuple):
    """The shares of test images that were classified correctly, one of each seed.

    Attributes:
        accuracy: of the network.
        control: of the network whose step lets no gradient through.
    """

    accuracy: np.ndarray
    control: np.ndarray

    @property
    def gain(self) -> float:
        """How many points the network is ahead of its control, in the mean."""
        return float(100 * (self.accuracy.mean() - self.control.mean()))


def probe(build: Build, seeds: int, steps: int, *, at_once: bool = True) -> Outcome:
    """Trains a network and its control, for some seeds.

    Args:
        build: makes the network.
        seeds: how many seeds; each splits the data anew.
        steps: how many steps of 64 images.
        at_once: whether all are trained in one program; one by one, a backward may write.
    """
    train, test = data.stacked(seeds)
    both = jnp.array([1.0, 0.0])

    def trained(seed: Any, passes: Any, train: data.Batch, test: data.Batch) -> jax.Array:
        rngs = nnx.Rngs(jax.random.key(seed))
        network = build(rngs)
        _fill(network, Switch, passes)

        def fitted(key: jax.Array) -> jax.Array:
            return _accuracy(fit(network, _loss, train, steps, key), test)

        return fitted(rngs()) if at_once else jax.jit(fitted)(rngs())

    if at_once:
        of_both = jax.vmap(trained, (None, 0, None, None))
        accuracy = jax.jit(jax.vmap(of_both, (0, None, 0, 0)))(jnp.arange(seeds), both, train, test)
    else:
        splits = [jax.tree.map(lambda a, n=n: a[n], (train, test)) for n in range(seeds)]
        accuracy = [
            [trained(seed, passes, *split) for passes in both] for seed, split in enumerate(splits)
        ]
    accuracy = np.asarray(accuracy)
    return Outcome(accuracy[:, 0], accuracy[:, 1])


def _loss(network: nnx.Module, batch: data.Batch) -> jax.Array:
    logits = network(data.flat(batch.images))  # type: ignore[operator]
    extra = sum(v[...] for _, v in nnx.to_flat_state(nnx.state(network, Loss)))
    errors = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return errors.mean() + extra


def _accuracy(network: nnx.Module, test: data.Batch) -> jax.Array:
    """The share of images that a network classifies correctly."""
    network.eval()
    return (network(data.flat(test.images)).argmax(-1) == test.labels).mean()  # type: ignore[operator]


def _fill(network: nnx.Module, kind: type[nnx.Variable], value: jax.Array) -> None:
    """Sets every Variable of a kind."""
    state = nnx.state(network, kind)
    nnx.update(network, jax.tree.map(lambda _: value, state))
