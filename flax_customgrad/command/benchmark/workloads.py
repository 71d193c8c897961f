"""One workload of the catalogue, measured: ours against flax.nnx, or against autodiff of ours."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from flax_customgrad.command.benchmark.paired import paired
from flax_customgrad.command.benchmark.steps import kept_bytes, scan_bytes, variants
from flax_customgrad.contract.autodiff import use_autodiff
from flax_customgrad.registry.entry import Entry, Example


@dataclass(frozen=True)
class Pair:
    """The bytes of the baseline and of ours; None where they do not exist."""

    baseline: int | None
    ours: int | None


@dataclass(frozen=True)
class Measurement:
    """The value and gradient of a layer on one workload, ours beside its baseline.

    Attributes:
        layer: the name of the layer.
        family: its family.
        workload: the name of the workload.
        baseline: "nnx", or "autodiff" of the same layer where flax.nnx has none.
        milliseconds: the median time of ours.
        ratio: time of the baseline divided by that of ours, the median of pairs; above 1 ours is
            faster.
        low: the lower quartile of that ratio.
        high: the upper quartile.
        kept_bytes: what the backward keeps beyond parameters and inputs.
        temporary_bytes: the temporary memory of the compiled value and gradient.
        others: the time of anything else in milliseconds, by name.
    """

    layer: str
    family: str
    workload: str
    baseline: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    kept_bytes: Pair
    temporary_bytes: Pair
    others: Mapping[str, float] = field(default_factory=dict)


SLOWER = 0.97
"""A ratio below this is a loss; above it, it is as good as noise."""


def measure(
    entry: Entry,
    workload: str,
    seconds: float,
    others: Mapping[str, Callable[[], Any]] | None = None,
    rounds: int = 21,
) -> Measurement:
    """Compiles a workload twice, and times both in pairs.

    Args:
        entry: the layer.
        workload: the name of one of its workloads.
        seconds: how long to time it.
        others: further functions to time in the same rounds, by name.
        rounds: how often to call each at least.
    """
    make = entry.workloads[workload]
    timed, temporary = {}, {}
    for name, compile_step in variants(entry, make).items():
        compiled, args = compile_step()
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes
        timed[name] = lambda f=compiled, a=args: f(*a)
    baseline, _ = timed
    times = paired({**timed, **(others or {})}, seconds, rounds)
    ours = times["ours"]
    return Measurement(
        entry.name,
        entry.family,
        workload,
        baseline,
        ours.milliseconds,
        ours.ratio,
        ours.low,
        ours.high,
        _both(entry, make, kept_bytes),
        Pair(temporary[baseline], temporary["ours"]),
        {name: times[name].milliseconds for name in others or {}},
    )


def scanned(entry: Entry, workload: str) -> Pair:
    """The temporary memory of the gradient of eight layers in a scan.

    Args:
        entry: the layer.
        workload: the name of one of its workloads.
    """
    return _both(entry, entry.workloads[workload], scan_bytes)


def _both(entry: Entry, make: Example, nbytes: Callable[[Any], int | None]) -> Pair:
    context: AbstractContextManager[Any] = nullcontext() if entry.is_drop_in else use_autodiff()
    with context:
        baseline = nbytes(make(entry.reference or entry.module))
    return Pair(baseline, nbytes(make(entry.module)))
