"""The benchmark of whole models: converted ones train as they did, and losing rows come first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import models, programs
from benchmarks.zoo import TASKS
from benchmarks.zoo.task import Task
from flax_customgrad.layers.linear.linear import linear


@pytest.mark.parametrize("name", TASKS)
def test_a_model_converts_as_a_whole_and_has_the_same_gradients(name):
    forms = programs.variants(lambda: TASKS[name](True))
    theirs, ours = forms["nnx"], forms["functions"]
    assert _packages(theirs) == {"benchmarks", "flax"}
    assert _packages(ours) == {"benchmarks", "flax_customgrad"}
    (expected, grads), (loss, our_grads) = _both(programs.step(*theirs), programs.step(*ours))
    np.testing.assert_allclose(loss[0], expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(our_grads), strict=True):
        largest = float(jnp.max(jnp.abs(a)))
        assert largest > 0
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * largest)


def _packages(form):
    """The packages that the layers of a model come from."""
    layers = (layer for _, layer in nnx.iter_modules(form[0].model))
    return {
        type(layer).__module__.partition(".")[0]
        for layer in layers
        if not isinstance(layer, nnx.List)
    }


def _both(*programs):
    """What two programs return, compiled as one."""

    def run(program, arguments):
        with program.context():
            return program.function(*arguments)

    of_both = jax.jit(lambda arguments: tuple(map(run, programs, arguments)))
    return of_both([program.arguments for program in programs])


def test_everything_is_measured_and_losing_rows_come_first(monkeypatch):
    forgot = []
    monkeypatch.setattr(programs, "clear_caches", lambda: forgot.append(1))
    task = Task(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((3, 2)), jnp.sum)
    rows = models.measure("Linear", lambda: task, seconds=0.0, rounds=2)
    assert len(forgot) == 9  # three forms, twice, and once before
    assert {row.form for row in rows} == {"converted", "functions"}
    assert {row.quantity for row in rows} == {"step", "forward", "memory", *programs.STAGES}
    assert all(row.low <= row.ratio <= row.high for row in rows)
    printed = [line[:24].strip() for line in models.lines(rows) if line.startswith("Linear: ")]
    lowest = {}
    for row in rows:
        lowest[row.quantity] = min(row.ratio, lowest.get(row.quantity, row.ratio))
    expected = [f"Linear: {quantity}" for quantity in sorted(lowest, key=lowest.__getitem__)]
    assert printed == expected


def test_cleared_caches_hold_nothing_that_was_traced(monkeypatch):
    traced, fun = [], linear.fun
    monkeypatch.setattr(linear, "fun", lambda *args: traced.append(1) or fun(*args))
    task = Task(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((5, 3)), jnp.sum)
    program = programs.step(*programs.variants(lambda: task)["converted"])
    counts = []
    for clear in (programs.clear_caches, lambda: None, programs.clear_caches):
        clear()
        program.trace()
        counts.append(len(traced))
    assert 0 < counts[0] == counts[1] < counts[2]
