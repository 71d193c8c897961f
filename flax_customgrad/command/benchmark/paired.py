"""Timing things against each other in one process, so that a machine's drift cancels out."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

# With glibc's default allocator page faults dominate: a LayerNorm took 21 ms instead of 9. Threads
# of PyTorch that wait awake slow down what is called next.
_PINNED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True)
class Timing:
    """What one of several paired functions took.

    Attributes:
        milliseconds: median time of a call.
        ratio: median over rounds of the first function's time divided by this one's; above 1 this
            one is faster.
        low: lower quartile of that ratio.
        high: upper quartile.
    """

    milliseconds: float
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.milliseconds:9.3f} ms  x{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]"


def pin_allocator(module: str) -> None:
    """Starts the process anew with the allocator pinned and threads that wait asleep, unless it is.

    Args:
        module: what the program is started as, `python -m module`.
    """
    if any(os.environ.get(name) != value for name, value in _PINNED.items()):
        os.environ.update(_PINNED)
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def paired(
    functions: Mapping[str, Callable[[], Any]], seconds: float = 4.0, rounds: int = 21
) -> dict[str, Timing]:
    """Calls functions in turn, and compares each with the first.

    Each round begins with another one, so that none of three follows itself: it would find its
    arrays in the cache.

    Args:
        functions: what to time, by name; the first is what the others are measured against.
        seconds: about how long to go on.
        rounds: the least number of rounds.
    """
    names = list(functions)
    for name in names:
        jax.block_until_ready(functions[name]())
    times: dict[str, list[float]] = {name: [] for name in names}
    start, n = time.perf_counter(), 0
    while n < rounds or time.perf_counter() - start < seconds:
        for name in rotated(names, n):
            began = time.perf_counter()
            jax.block_until_ready(functions[name]())
            times[name].append(time.perf_counter() - began)
        n += 1
    return compared(times)


def rotated(names: Sequence[str], n: int) -> list[str]:
    """The names in the order of round n."""
    k = n % len(names)
    return [*names[k:], *names[:k]]


def compared(times: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """What several things took in the same rounds, each compared with the first.

    Args:
        times: seconds of each round, by name.
    """
    baseline = next(iter(times.values()))
    result = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(baseline, seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = Timing(1e3 * statistics.median(seconds), middle, low, high)
    return result
