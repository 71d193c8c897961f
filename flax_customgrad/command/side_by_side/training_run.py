"""A network in training, as pure functions of its state, which JAX compiles, times and traces."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from flax_customgrad.command.side_by_side.task import Examples, Task
from flax_customgrad.contract.residuals import residual_bytes

_OPTIMIZER = optax.adam(1e-3)


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class TrainingState(NamedTuple):
    """What a step changes."""

    params: nnx.State
    statistics: nnx.State
    optimizer: Any


class TrainingRun:
    """A network, its state, and the course of its training.

    Args:
        task: what it is trained on.
        network: the network.
        context: decorates the function that calls it.

    Attributes:
        state: parameters, statistics and the optimizer's state.
        losses: the training loss of each step so far.
        accuracies: the share of each step's labels that was classified correctly.
    """

    def __init__(self, task: Task, network: nnx.Module, context: Decorator = lambda f: f):
        self._task = task
        self._graph, params, statistics = nnx.split(network, nnx.Param, ...)
        self.state = TrainingState(params, statistics, _OPTIMIZER.init(params))  # type: ignore[arg-type]
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        # The loss of graph, params, statistics and batch, traced in the context.
        self._loss = context(functools.partial(_loss, task))
        self._step = jax.jit(functools.partial(_step, self._loss, self._graph))

    def step(self, batch: Examples) -> nnx.State:
        """Trains on a batch; returns the gradient."""
        self.state, loss, accuracy, gradient = self._step(self.state, batch)
        self.losses.append(float(loss))
        self.accuracies.append(float(accuracy))
        return gradient

    def seconds(self, batch: Examples) -> float:
        """How long a step takes; its result is dropped."""
        start = time.perf_counter()
        jax.block_until_ready(self._step(self.state, batch))
        return time.perf_counter() - start

    def test_accuracy(self, test: Examples) -> float:
        """The share of labels that is predicted correctly, with the statistics of training."""
        network = nnx.merge(self._graph, self.state.params, self.state.statistics)
        predict = nnx.jit(lambda network, test: self._task.logits(network, test, False))
        return float((predict(network, test).argmax(-1) == test.labels).mean())

    def residual_bytes(self, batch: Examples) -> int:
        """The bytes kept for the backward of the loss, parameters excluded."""
        _, statistics, _ = self.state
        loss = lambda params: self._loss(params, self._graph, statistics, batch)[0]  # noqa: E731
        return residual_bytes(loss, self.state.params)


def _step(
    loss: Callable[..., Any], graph: Any, state: TrainingState, batch: Examples
) -> tuple[TrainingState, jax.Array, jax.Array, nnx.State]:
    """One step of the optimizer: the new state, loss, accuracy and gradient."""
    params, statistics, optimizer = state
    loss_and_gradient = jax.value_and_grad(loss, has_aux=True)
    (value, (statistics, accuracy)), gradient = loss_and_gradient(params, graph, statistics, batch)
    updates, optimizer = _OPTIMIZER.update(gradient, optimizer)
    params = optax.apply_updates(params, updates)
    return TrainingState(params, statistics, optimizer), value, accuracy, gradient  # type: ignore[arg-type]


def _loss(
    task: Task, params: nnx.State, graph: Any, statistics: nnx.State, batch: Examples
) -> tuple[jax.Array, tuple[nnx.State, jax.Array]]:
    """The mean cross-entropy; and the new statistics, and the accuracy."""
    # A copy, since BatchNorm writes its statistics and may not write those of the caller.
    network = nnx.merge(graph, params, statistics, copy=True)
    logits = task.logits(network, batch, True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
    accuracy = (logits.argmax(-1) == batch.labels).mean()
    return loss, (nnx.state(network, nnx.Not(nnx.Param)), accuracy)
