"""`train`: what a person sees, what is saved, and an exit status that can be trusted."""

import contextlib
import dataclasses
import io
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import flax_customgrad as fcg
from flax_customgrad import catalogue
from flax_customgrad.__main__ import main
from flax_customgrad.command.digits import data, digits_task
from flax_customgrad.command.digits.network import Network
from flax_customgrad.command.side_by_side import comparison, figure, progress, table
from flax_customgrad.command.side_by_side.comparison import LayerPair, RunComparison, RunResult
from flax_customgrad.command.side_by_side.task import batches

PNG = b"\x89PNG\r\n\x1a\n"


def _train(*arguments):
    """Runs the command; returns its exit status, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["train", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


def _fates(out):
    """What the table says of each layer: its class before and after, and its fate, by path."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in out.splitlines())
    return {row[0]: row[1:] for row in rows if len(row) == 4 and re.match(r"nnx\.[A-Z]", row[1])}


class DoubledBias(fcg.Linear):
    """Computes as it should, but its bias has twice the gradient."""

    def __call__(self, inputs, out_sharding=None):
        bias = self.bias[...]
        return super().__call__(inputs, out_sharding) + bias - jax.lax.stop_gradient(bias)


class Small(nnx.Module):
    """A network of other layers, under other names, than that of the command."""

    def __init__(self, rngs):
        self.rows = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.LinearGeneral((8, 8), 10, axis=(-2, -1), rngs=rngs)

    def __call__(self, images, training):
        return self.head(nnx.relu(self.norm(self.rows(images[..., 0]))))


def test_the_whole_job(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_ROUNDS", 3)
    figure_path = tmp_path / "figure.png"
    status, out, err = _train("--steps", 40, "--seed", 1, "--out", figure_path)
    assert (status, err) == (0, "")
    assert figure_path.read_bytes().startswith(PNG)

    # Without a terminal: a few lines, and nothing that moves a cursor.
    assert len(re.findall(r"^step +\d+/40  plain nnx: loss .* converted: ", out, re.M)) == 10
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out)

    shown = out[out.index("digits, 40 steps, seed 1") :]
    assert max(map(len, shown.splitlines())) <= 80
    for row in ("final loss", "gradient, step 1", "step time", "quartiles", "kept for backward"):
        assert shown.count(f" {row} ") == 1
    (accuracies,) = (line for line in shown.splitlines() if "test accuracy" in line)
    assert min(float(percent) for percent in re.findall(r"([\d.]+)%", accuracies)) > 90

    # Exactly the layers whose class `convert` changes are said to be converted.
    plain, converted = Network(nnx.Rngs(0)), fcg.convert(Network(nnx.Rngs(0)))
    paths = [path for path, part in vars(plain).items() if isinstance(part, nnx.Module)]
    changed = {p for p in paths if type(getattr(plain, p)) is not type(getattr(converted, p))}
    fates = _fates(shown)
    assert set(fates) == set(paths)
    assert {path for path, (*_, fate) in fates.items() if fate == "converted"} == changed
    assert {path for path, (before, after, _) in fates.items() if before != after} == changed
    assert {fates[path][-1] for path in set(paths) - changed} <= {"no drop-in yet"}


def test_a_wrong_gradient_is_found(tmp_path, monkeypatch):
    def convert(model):
        model.rows.__class__ = DoubledBias
        return model

    drop_ins = {nnx.Linear: fcg.Linear, nnx.LinearGeneral: fcg.LinearGeneral}
    monkeypatch.setattr(catalogue, "drop_ins", lambda: drop_ins)
    monkeypatch.setattr(digits_task, "TASK", digits_task.TASK._replace(network=Small))
    monkeypatch.setattr(comparison, "_ROUNDS", 3)
    monkeypatch.setattr(fcg, "convert", convert)
    monkeypatch.setenv("COLUMNS", "120")
    figure_path = tmp_path / "figure.png"
    status, out, err = _train("--steps", 2, "--quiet", "--out", figure_path)
    assert status == 1
    assert err.count("\n") == 1
    assert "the gradient of rows/bias differs by 1.0e+00 at the first step" in err
    assert _fates(out) == {
        "rows": ["nnx.Linear", "DoubledBias", "converted"],
        "norm": ["nnx.LayerNorm", "nnx.LayerNorm", "no drop-in yet"],
        "head": ["nnx.LinearGeneral", "nnx.LinearGeneral", "left as it was"],
    }
    assert "plain nnx: loss" not in out
    assert figure_path.exists()


def _comparison(**changes):
    outcome = RunResult([2.0, 1.0], 0.98, [1e-3, 2e-3, 3e-3], 100)
    layer = LayerPair("dense", nnx.Linear, fcg.Linear)
    return dataclasses.replace(
        RunComparison(
            digits_task.TASK,
            2,
            0,
            [layer],
            {"dense/kernel": 3e-7, "dense/bias": 0.0},
            outcome,
            outcome,
        ),
        **changes,
    )


@pytest.mark.smoke
def test_agreement_is_no_disagreement():
    assert _comparison().disagreements() == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"gradients": {"dense/bias": 1.1e-4}}, "the gradient of dense/bias differs by 1.1e-04"),
        ({"gradients": {"dense/bias": math.inf}}, "differs by inf"),
        ({"converted": RunResult([1.0], 0.95, [1e-3] * 2, 1)}, "accuracy differs by 3.0 points"),
        ({"plain": RunResult([1.0, math.nan], 0.98, [1e-3] * 2, 1)}, "plain run is not finite"),
        ({"converted": RunResult([math.inf], 0.98, [1e-3] * 2, 1)}, "converted run is not finite"),
    ],
)
def test_each_disagreement_is_named(changes, complaint):
    (found,) = _comparison(**changes).disagreements()
    assert complaint in found


def test_the_ratio_shown_is_that_of_the_times_shown(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    slow = RunResult([1.0], 0.98, [2e-3, 3e-3, 10e-3], 1)
    fast = RunResult([1.0], 0.98, [1e-3, 10e-3, 4e-3], 1)
    result = _comparison(plain=slow, converted=fast)
    # The median of the ratios of the pairs is 2.
    assert result.speed == pytest.approx((0.3, 0.75, 2.5))
    console = Console(file=io.StringIO(), width=80)
    console.print(table.make(result, Path("figure.png")))
    lines = console.file.getvalue().splitlines()
    (shown,) = (line.split() for line in lines if "step time" in line)
    assert shown[2:] == ["3", "ms", "4", "ms", "0.75", "times", "as", "fast"]


@pytest.mark.parametrize(
    ("loss", "difference"), [(1.0, 0.0), (1.0, 1e-12), (math.inf, 30.0), (math.nan, math.inf)]
)
def test_anything_can_be_drawn(tmp_path, loss, difference):
    run = RunResult([loss, loss], 0.1, [1e-3], 1)
    changes = {"plain": run, "converted": run, "gradients": {"dense/bias": difference}}
    figure.save(_comparison(**changes), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_two_bars_in_a_terminal():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    run = SimpleNamespace(losses=[0.5], accuracies=[0.25])
    with progress.on_console(console, 1) as watch:
        watch(run, run)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.getvalue())
    for name in ("plain nnx", "converted"):
        assert re.search(rf"{name} \S+ 1/1 loss 0.5000 accuracy +25.0%", text)
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 80


def test_batches_pass_over_the_data():
    train, test = data.load(0)
    assert len(train.labels) == 1347
    assert len(test.labels) == 450
    numbered = data.Batch(train.images, np.arange(1347))
    seen = [batch.labels for batch in batches(numbered, 42, seed=3, size=64)]
    assert {len(batch) for batch in seen} == {64}
    for epoch in (seen[:21], seen[21:]):
        assert len(np.unique(np.concatenate(epoch))) == 21 * 64
    again = [batch.labels for batch in batches(numbered, 42, seed=3, size=64)]
    np.testing.assert_array_equal(seen, again)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "argument --steps: there must be at least 1, got 0"),
        (["--steps", "many"], "argument --steps: expected a whole number, got 'many'"),
        (["--seed", "-1"], "argument --seed: a seed is from 0 to 4294967295, got -1"),
        (["--seed", str(2**32)], "argument --seed: a seed is from 0"),
        (["--out", "figure.pdf"], "argument --out: the figure is a .png file, got 'figure.pdf'"),
        (["--out", "nowhere/f.png"], "argument --out: there is no directory 'nowhere'"),
        (["--out", "taken.png"], "argument --out: cannot write to 'taken.png'"),
        (["--task", "images"], "argument --task: invalid choice: 'images'"),
        (["--verbose"], "unrecognized arguments: --verbose"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.png").mkdir()
    status, out, err = _train(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert complaint in err


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "optax"])
def test_missing_packages(tmp_path, monkeypatch, package):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    status, out, err = _train()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert 'pip install "flax-customgrad[train]"' in err
