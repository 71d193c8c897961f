"""Two runs on the same batches from the same seed, and how far they are apart."""

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

import flax_customgrad
from flax_customgrad.command.side_by_side.task import Examples, Task, batches
from flax_customgrad.command.side_by_side.training_run import TrainingRun
from flax_customgrad.model.conversion import conversion
from flax_customgrad.model.tree import layers
from flax_customgrad.testing.difference import relative_error

GRADIENT_TOLERANCE = 1e-4
"""The relative difference allowed between two gradients at the first step."""

_ACCURACY_TOLERANCE = 0.02
_ROUNDS = 100

Watch = Callable[[TrainingRun, TrainingRun], None]
"""Called with the plain and the converted run after each step."""


@dataclass(frozen=True)
class LayerPair:
    """A layer of the network, before and after the conversion.

    Attributes:
        path: where it is, such as "dense_1".
        plain: its class in the plain network.
        converted: its class in the converted one.
    """

    path: str
    plain: type
    converted: type

    @property
    def is_converted(self) -> bool:
        """Whether its class has changed."""
        return self.converted is not self.plain


@dataclass(frozen=True)
class RunResult:
    """The measurements of one run.

    Attributes:
        losses: the training loss of each step.
        test_accuracy: from 0 to 1.
        seconds: of steps timed after training; those of the two runs were taken in pairs.
        residual_bytes: what is kept for the backward of the loss, parameters excluded.
    """

    losses: list[float]
    test_accuracy: float
    seconds: list[float]
    residual_bytes: int


@dataclass(frozen=True)
class RunComparison:
    """A plain and a converted run.

    Attributes:
        task: what both were trained on.
        steps: how many steps both were trained.
        seed: the seed of both.
        layers: the layers of the network, without the Modules that only hold others.
        gradients: largest difference of each parameter's gradient at the first step, relative to
            its largest value in the plain run.
        plain: the run of the layers of flax.nnx.
        converted: the run of the converted layers.
    """

    task: Task
    steps: int
    seed: int
    layers: list[LayerPair]
    gradients: dict[str, float]
    plain: RunResult
    converted: RunResult

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter whose gradients differ most, and by how much."""
        return max(self.gradients.items(), key=lambda item: item[1])

    @property
    def speed(self) -> tuple[float, float, float]:
        """Time of a plain step / of a converted one: lower quartile, ratio of medians, upper one.

        The medians are what the table shows; the quartiles are those of the pairs.
        """
        plain, converted = self.plain.seconds, self.converted.seconds
        ratios = [p / c for p, c in zip(plain, converted, strict=True)]
        lower, _, upper = statistics.quantiles(ratios, n=4)
        return lower, statistics.median(plain) / statistics.median(converted), upper

    def disagreements(self) -> list[str]:
        """The ways in which the two runs differ by more than rounding; empty if there are none."""
        reasons = []
        path, difference = self.worst_gradient
        if difference > GRADIENT_TOLERANCE:
            reasons.append(
                f"the gradient of {path} differs by {difference:.1e} at the first step, "
                f"{GRADIENT_TOLERANCE:.0e} is allowed"
            )
        apart = abs(self.plain.test_accuracy - self.converted.test_accuracy)
        if apart > _ACCURACY_TOLERANCE:
            reasons.append(
                f"test accuracy differs by {100 * apart:.1f} points, "
                f"{100 * _ACCURACY_TOLERANCE:.0f} are allowed"
            )
        for name, run in {"plain": self.plain, "converted": self.converted}.items():
            if not all(map(math.isfinite, run.losses)):
                reasons.append(f"the loss of the {name} run is not finite")
        return reasons


def compare(
    task: Task, steps: int, seed: int, show: AbstractContextManager[Watch]
) -> RunComparison:
    """Trains both networks step by step, then measures them.

    The converted network is called inside of `functions`: what it calls by name is ours too.

    Args:
        task: the network and its data.
        steps: how many steps, at least 1.
        seed: of the split of the data, the parameters and the batches.
        show: a context that shows the training while it lasts.
    """
    train, test = task.load(seed)
    network = task.network(nnx.Rngs(seed))
    classes = {path: type(layer) for (path, *_), layer in layers(network)}
    plain = TrainingRun(task, network)
    network = flax_customgrad.convert(task.network(nnx.Rngs(seed)))
    listed = {row.paths[0] for row in conversion(network).rows if row.kind == "layer"}
    pairs = [
        LayerPair(path, classes[path], type(layer))
        for (path, *_), layer in layers(network)
        if path in listed
    ]
    converted = TrainingRun(task, network, flax_customgrad.functions())
    # On a GPU, products of float32 are otherwise rounded to fewer bits, differently in each run.
    with jax.default_matmul_precision("float32"):
        gradients = {}
        with show as watch:
            for batch in batches(train, steps, seed, task.batch):
                expected, got = plain.step(batch), converted.step(batch)
                gradients = gradients or _differences(got, expected)
                watch(plain, converted)
        batch = next(batches(train, 1, seed, task.batch))
        seconds = _paired_seconds(plain, converted, batch)
        results = [
            RunResult(run.losses, run.test_accuracy(test), times, run.residual_bytes(batch))
            for run, times in zip((plain, converted), seconds, strict=True)
        ]
    return RunComparison(task, steps, seed, pairs, gradients, *results)


def _differences(got: nnx.State, expected: nnx.State) -> dict[str, float]:
    """The relative difference of each parameter's gradient, by path."""
    return {
        "/".join(map(str, path)): relative_error(np.asarray(g[...]), np.asarray(e[...]))
        for (path, g), (_, e) in zip(
            nnx.to_flat_state(got), nnx.to_flat_state(expected), strict=True
        )
    }


def _paired_seconds(
    plain: TrainingRun, converted: TrainingRun, batch: Examples
) -> tuple[list[float], ...]:
    """Times steps of both in turn, so that whatever else the machine does slows both alike."""
    pairs = []
    for k in range(_ROUNDS):
        first, second = (plain, converted) if k % 2 else (converted, plain)
        taken = {run: run.seconds(batch) for run in (first, second)}
        pairs.append((taken[plain], taken[converted]))
    return tuple(map(list, zip(*pairs, strict=True)))
