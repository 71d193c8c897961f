"""`bench`: what is measured, in which order it is shown, and what is saved."""

import dataclasses
import itertools
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad import catalogue
from flax_customgrad.__main__ import main
from flax_customgrad.command import bench
from flax_customgrad.command.benchmark import workloads
from flax_customgrad.command.benchmark.paired import rotated
from flax_customgrad.command.benchmark.steps import step
from flax_customgrad.command.benchmark.workloads import Measurement, Pair, measure
from flax_customgrad.registry.examples import made, normal


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    entries = [
        dataclasses.replace(catalogue.find(name), workloads={"8x4": example})
        for name, example in (
            ("silu", lambda f: (f, jnp.ones((8, 4)))),
            ("LoRA", made(4, 2, 4, inputs=(lambda: normal(8, 4),))),
            ("SwiGLU", made(4, 8, inputs=(lambda: normal(8, 4),))),
        )
    ]
    monkeypatch.setattr(catalogue, "entries", lambda: tuple(entries))
    # Whatever else the machine does, two are slower.
    ratios = {"silu": 1.5, "LoRA": 0.9, "SwiGLU": 0.5}
    monkeypatch.setattr(bench, "measure", lambda *args: _with_ratio(measure(*args), ratios))
    paired = workloads.paired
    monkeypatch.setattr(workloads, "paired", lambda steps, *_: paired(steps, 0.0, rounds=2))


def _with_ratio(measured: Measurement, ratios: dict[str, float]) -> Measurement:
    ratio = ratios[measured.layer]
    return dataclasses.replace(measured, ratio=ratio, low=ratio - 0.1, high=ratio + 0.1)


@pytest.mark.parametrize("columns", [80, 120])
def test_losing_workloads_come_first(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["bench", "SILU", "lora", "SwiGLU", "--seconds", "1"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("3 workloads of 3 layers, about 18 s; ")
    assert max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines[3:6]] == ["SwiGLU:", "LoRA:", "silu:"]
    assert "0.90  0.80-1.00" in lines[4]
    assert lines[3].startswith("SwiGLU: 8x4 *")
    assert lines[6].startswith("* against autodiff")
    assert lines[-1].startswith("3 workloads, 2 below 0.97 times as fast; jax ")


def test_what_the_backwards_keep():
    entry = catalogue.find("silu")
    kept = measure(entry, "8x4", 0.0).kept_bytes
    # The input is the caller's.
    assert kept.ours == 0
    assert kept.baseline >= 8 * 4 * 4
    glu = measure(catalogue.find("SwiGLU"), "8x4", 0.0)
    assert glu.baseline == "autodiff"
    assert glu.kept_bytes.ours < glu.kept_bytes.baseline


def test_none_of_three_functions_follows_itself():
    names = ["a", "b", "c"]
    rounds = [rotated(names, n) for n in range(6)]
    for position in range(3):
        assert sorted(names * 2) == sorted(order[position] for order in rounds)
    calls = itertools.chain.from_iterable(rounds)
    assert all(name != after for name, after in itertools.pairwise(calls))


def test_a_step_is_the_output_and_the_gradients():
    layer = fcg.Linear(3, 2, rngs=nnx.Rngs(0))
    compiled, (state, x, g) = step((layer, normal(4, 3)))
    y, (dstate, dx) = compiled(state, x, g)
    np.testing.assert_allclose(y, layer(x), rtol=1e-5)
    np.testing.assert_allclose(dx, g @ layer.kernel[...].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dstate["bias"][...], g.sum(0), rtol=1e-5, atol=1e-5)


def test_it_is_saved(capsys, tmp_path):
    saved, chart = tmp_path / "bench.json", tmp_path / "bench.svg"
    assert main(["bench", "silu", "--json", str(saved), "--out", str(chart)]) == 0
    record = json.loads(saved.read_text())
    assert set(record) == {"machine", "date", "versions", "rows"}
    (workload,) = record["rows"]
    assert (workload["layer"], workload["baseline"]) == ("silu", "nnx")
    assert workload["kept_bytes"]["ours"] == 0
    assert "silu, 8x4" in chart.read_text()
    assert capsys.readouterr().err == ""


def test_a_chart_needs_the_extra_plot_alone(capsys, monkeypatch, tmp_path):
    for package in ("sklearn", "optax"):
        monkeypatch.setitem(sys.modules, package, None)
    chart = str(tmp_path / "bench.svg")
    assert main(["bench", "silu", "--out", chart]) == 0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    capsys.readouterr()
    assert main(["bench", "silu", "--out", chart]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert 'matplotlib is not installed: pip install "flax-customgrad[plot]"' in err


def test_it_can_be_interrupted(capsys, monkeypatch, tmp_path):
    def interrupted(entry, workload, seconds):
        if entry.name != "silu":
            raise KeyboardInterrupt
        nothing = Pair(0, 0)
        return Measurement("silu", "a", workload, "nnx", 1.0, 1.0, 0.9, 1.1, nothing, nothing)

    monkeypatch.setattr(bench, "measure", interrupted)
    saved = tmp_path / "bench.json"
    assert main(["bench", "--json", str(saved)]) == 130
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("interrupted; 1 of 3 workloads, none below 0.97")
    assert err == ""
    assert len(json.loads(saved.read_text())["rows"]) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sillu"], "no layer 'sillu': did you mean silu"),
        (["--seconds", "x"], "expected a number of seconds, got 'x'"),
        (["--out", "chart.pdf"], "the figure is a .svg or .png file, got 'chart.pdf'"),
        (["--json", "no/such/file"], "there is no directory 'no/such'"),
    ],
    ids=["name", "seconds", "chart", "json"],
)
def test_bad_arguments(capsys, arguments, complaint):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert complaint in err
