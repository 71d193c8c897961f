"""`check`: one line per example, and an exit status that says whether all is well."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad import catalogue
from flax_customgrad.__main__ import main


@fcg.custom_vjp
def _product(params, x):
    return x @ params["kernel"] + params["bias"]


_product.defvjp(
    lambda params, x: (_product(params, x), (params, x)),
    lambda res, g: (
        nnx.State({"kernel": res[1].T @ g, "bias": 2 * g.sum(0)}),
        g @ res[0]["kernel"].T,
    ),
)


class DoubledBias(fcg.Linear):
    def __call__(self, inputs, out_sharding=None):
        return _product(nnx.State({"kernel": self.kernel[...], "bias": self.bias[...]}), inputs)


def _catalogue(monkeypatch, name, **examples):
    """Leaves one entry in the catalogue, with other examples."""
    entry = dataclasses.replace(catalogue.find(name), examples=examples)
    monkeypatch.setattr(catalogue, "entries", lambda: (entry,))


def _of(out, name):
    """The line of one example: its status and its numbers."""
    (line,) = (line for line in out.splitlines() if line.endswith(f"  {name}"))
    return line.removesuffix(name).split()


def _linear(cls):
    return cls(3, 4, rngs=nnx.Rngs(0)), jnp.ones((8, 3))


def test_a_line_per_example_or_a_table_of_each(capsys, monkeypatch):
    _catalogue(monkeypatch, "Linear", one=_linear, two=_linear)
    arguments = ["check", "Linear", "Linear", "--only", "autodiff, residuals"]
    assert main(arguments) == 0  # A layer named twice is checked once.
    out = capsys.readouterr().out
    for name in ("one", "two"):
        assert _of(out, f"Linear: {name}")[0] == "ok"
    assert re.search(r"^2 examples: \d+ comparisons, 0 failed, 0 skipped", out, re.M)
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "gradient of" not in out

    assert main([*arguments, "--details"]) == 0
    out = capsys.readouterr().out
    assert "gradient of Linear: one" in out
    assert "residuals" in out


def test_skipped_comparisons_are_counted_and_explained(capsys, monkeypatch):
    # A kernel with a batch axis cannot be split over devices by its inputs alone.
    def batched(cls):
        layer = cls(3, 4, axis=-1, batch_axis={0: 8}, rngs=nnx.Rngs(0))
        return layer, jnp.ones((8, 2, 3))

    _catalogue(monkeypatch, "LinearGeneral", batched=batched)
    assert main(["check", "--only", "shard_map"]) == 0
    out = capsys.readouterr().out
    assert _of(out, "LinearGeneral: batched")[1:3] == ["0", "2"]
    assert "0 failed, 2 skipped" in out
    assert out.count("skipped: shard_map, check_vma=") == 2


@pytest.mark.smoke
def test_a_wrong_gradient_fails(capsys, monkeypatch):
    _catalogue(monkeypatch, "Linear", wrong=lambda _: _linear(DoubledBias))
    assert main(["check", "--only", "autodiff"]) == 1
    out = capsys.readouterr().out
    assert _of(out, "Linear: wrong")[0] == "failed"
    assert "failed: autodiff, gradient, bias: off by 1.0e+00" in out
    assert re.search(r" [1-9]\d* comparisons, 1 failed", out)


def test_it_can_be_interrupted(capsys, monkeypatch):
    def interrupted(layer, x):
        raise KeyboardInterrupt

    _catalogue(monkeypatch, "Linear", one=_linear, two=lambda cls: (interrupted, *_linear(cls)))
    assert main(["check", "Linear", "--only", "autodiff"]) == 130
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("interrupted; 1 of 2 examples: ")
    assert err == ""


def test_any_command_is_interrupted_in_one_line(capsys, monkeypatch):
    def entries():
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "entries", entries)
    assert main(["list"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "flax-customgrad list: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["Linaer"], "no layer 'Linaer': did you mean Linear"),
        (["--only", "autodiff,vmpa"], "no check 'vmpa'; there are autodiff, "),
        (["--only", ""], "no check ''"),
        (["--all"], "unrecognized arguments: --all"),
    ],
)
def test_bad_arguments(capsys, arguments, complaint):
    assert main(["check", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert complaint in err


def test_brings_its_own_devices():
    """Run as a command, without any setting of the environment, the mesh is real."""
    settings = ("XLA_FLAGS", "JAX_PLATFORMS")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    command = [sys.executable, "-m", "flax_customgrad", "check", "LoRA", "--only", "shard_map"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r" [1-9]\d* comparisons, 0 failed, 0 skipped", done.stdout)


def test_json_is_a_record_of_each_layer_for_the_documentation(capsys, monkeypatch, tmp_path):
    _catalogue(monkeypatch, "Linear", one=_linear, two=_linear)
    path = tmp_path / "checks.json"
    checks = ["--only", "autodiff,residuals"]
    assert main(["check", *checks, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["machine"]
    assert set(record["versions"]) == {"Python", "jax", "flax"}
    (row,) = record["rows"]
    assert (row["layer"], row["examples"]) == ("Linear", 2)
    (check,) = row["checks"]  # Nothing is compared in "residuals".
    assert (check["check"], check["compared"], check["skipped"]) == ("autodiff", 8, 0)
    assert 0 <= check["error"] <= check["allowed"] == 1e-9


def test_json_is_not_written_where_a_check_fails(capsys, monkeypatch, tmp_path):
    _catalogue(monkeypatch, "Linear", bias=lambda cls: _linear(DoubledBias))
    path = tmp_path / "checks.json"
    assert main(["check", "--only", "autodiff", "--json", str(path)]) == 1
    assert not path.exists()
    assert "is not written" in capsys.readouterr().out
