"""`check`: one line per example, and an exit status that says whether all is well."""

import dataclasses
import os
import re
import subprocess
import sys

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


def _catalogue(monkeypatch, name, example, **changes):
    """Leaves one example of one entry in the catalogue."""
    entry = catalogue.find(name)
    kept = {example: entry.examples[example]}
    entry = dataclasses.replace(entry, examples=kept, **changes)
    monkeypatch.setattr(catalogue, "entries", lambda: (entry,))


def _of(out, name):
    """The line of one example."""
    (line,) = (line for line in out.splitlines() if f" {name} " in line)
    return line.split()


def test_a_line_per_example(capsys):
    assert main(["check", "Linear", "--only", "autodiff"]) == 0
    out = capsys.readouterr().out
    examples = catalogue.find("Linear").examples
    for name in examples:
        assert _of(out, f"Linear: {name}")[0] == "ok"
    assert re.search(rf"^{len(examples)} examples: \d+ comparisons, 0 failed, 0 skipped", out, re.M)
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_layer_named_twice_is_checked_once(capsys):
    assert main(["check", "LoRA", "LoRA", "--only", "residuals"]) == 0
    assert capsys.readouterr().out.count(" LoRA: alone ") == 1


def test_details_print_the_table(capsys):
    assert main(["check", "LoRA", "--only", "autodiff, residuals", "--details"]) == 0
    out = capsys.readouterr().out
    assert "gradient of LoRA: alone" in out
    assert "residuals" in out


def test_skipped_comparisons_are_counted_and_explained(capsys, monkeypatch):
    # A kernel with a batch axis cannot be split over devices by its inputs alone.
    _catalogue(monkeypatch, "LinearGeneral", "batch axis")
    assert main(["check", "--only", "shard_map"]) == 0
    out = capsys.readouterr().out
    assert _of(out, "LinearGeneral: batch axis")[4:6] == ["0", "2"]
    assert "0 failed, 2 skipped" in out
    assert out.count("skipped: shard_map, check_vma=") == 2


def test_a_wrong_gradient_fails(capsys, monkeypatch):
    _catalogue(monkeypatch, "Linear", "bias", module=DoubledBias)
    assert main(["check", "--only", "autodiff"]) == 1
    out = capsys.readouterr().out
    assert _of(out, "Linear: bias")[0] == "failed"
    assert "failed: autodiff, gradient, bias: off by 1.0e+00" in out
    assert "4 comparisons, 1 failed" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["Linaer"], "no layer 'Linaer'; there are "),
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
