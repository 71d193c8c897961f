"""The step and the forward of a model as programs: traced, compiled, and how long each takes."""

import functools
import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

import flax_customgrad as fcg
from benchmarks.zoo.task import Task
from flax_customgrad.command.benchmark.paired import rotated


@dataclass(frozen=True)
class Program:
    """A function of arrays, and where it is traced.

    Attributes:
        function: the function, not jitted.
        arguments: trees of arrays.
        context: what makes the context to trace it in.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    context: Callable[[], AbstractContextManager[Any]]

    def trace(self) -> Any:
        """The program traced, by a new jit."""
        with self.context():
            return jax.jit(lambda *args: self.function(*args)).trace(*self.arguments)

    def compile(self) -> Any:
        """The program compiled."""
        return self.trace().lower().compile()


def step(task: Task, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Program:
    """The loss, its gradient for the parameters, and the statistics that the model has written.

    Args:
        task: the model and what it is trained on.
        context: what makes the context to trace it in.
    """
    graphdef, params, rest = nnx.split(task.model, nnx.Param, ...)

    def value_and_grad(params: nnx.State, rest: nnx.State, x: jax.Array) -> Any:
        def loss(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            model = nnx.merge(graphdef, params, rest, copy=True)
            return task.loss(model(x)), nnx.state(model, nnx.Not(nnx.Param))

        return jax.value_and_grad(loss, has_aux=True)(params)

    return Program(value_and_grad, (params, rest, task.x), context)


def forward(
    task: Task, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Program:
    """What the model returns in evaluation.

    Args:
        task: the model and its input.
        context: what makes the context to trace it in.
    """
    model = nnx.clone(task.model)
    model.eval()
    graphdef, state = nnx.split(model)
    return Program(lambda state, x: nnx.merge(graphdef, state)(x), (state, task.x), context)


def variants(make: Callable[[], Task]) -> dict[str, tuple[Task, Callable[[], Any]]]:
    """A model as it was written, converted, and converted with functions called by name as well.

    Args:
        make: makes the model and what it is trained on.

    Returns:
        By name, what to measure and what makes the context to trace it in; that of nnx is first.
    """
    task = make()
    converted = task._replace(model=fcg.convert(nnx.clone(task.model)))
    return {
        "nnx": (task, nullcontext),
        "converted": (converted, nullcontext),
        "functions": (converted, fcg.functions),
    }


STAGES = ("trace", "trace, CPU", "compile", "compile, CPU")
"""What `stages` measures: tracing, and lowering and compiling; by the clock, and the processor's
time of all threads, since XLA compiles on several."""


def stages(programs: Mapping[str, Program], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Traces and compiles programs in turn, with nothing in any cache.

    Args:
        programs: the programs, by name.
        rounds: how often, after one time that pays for what is done once.

    Returns:
        For each of `STAGES` and each program the seconds of every round.
    """
    names = list(programs)
    seconds: dict[str, dict[str, list[float]]] = {s: {n: [] for n in names} for s in STAGES}
    for i in range(-1, rounds):
        for name in rotated(names, i):
            clear_caches()
            clocks = [(time.perf_counter(), time.process_time())]
            traced = programs[name].trace()
            clocks.append((time.perf_counter(), time.process_time()))
            traced.lower().compile()
            clocks.append((time.perf_counter(), time.process_time()))
            if i < 0:
                continue
            traced_at, compiled_at = clocks[1], clocks[2]
            for k, suffix in enumerate(("", ", CPU")):
                seconds[f"trace{suffix}"][name].append(traced_at[k] - clocks[0][k])
                seconds[f"compile{suffix}"][name].append(compiled_at[k] - traced_at[k])
    return seconds


def clear_caches() -> None:
    """Forgets what was traced and compiled: in JAX, and in this library, which traces once.

    What is alive then is searched for garbage no more. A search takes 0.1 s, and would be part of
    what happens to be measured when it is due.
    """
    gc.unfreeze()
    jax.clear_caches()
    for cache in gc.get_objects():
        # Not `isinstance`, which would ask modules that load when they are asked.
        if type(cache) is functools._lru_cache_wrapper and _is_ours(cache):
            cache.cache_clear()
    gc.collect()
    gc.freeze()


def _is_ours(function: Any) -> bool:
    return str(function.__module__).partition(".")[0] == fcg.__name__
