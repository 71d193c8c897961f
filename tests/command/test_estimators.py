"""The command that trains through each estimator: it covers the catalogue, and can fail."""

import re

import numpy as np
import pytest

from flax_customgrad import catalogue
from flax_customgrad.__main__ import main
from flax_customgrad.command.digits import autoencoder, controlled, trials

# What shapes a gradient has no step to learn through, a function is tried as the layer that calls
# it, and cells of neurons learn in a network over time.
WITHOUT = {
    "stochastic_round",
    "gumbel_softmax",
    "reinmax",
    "top_k_st",
    "straight_through_estimator",
    "rotation_trick",
    "Leaky",
    "LIF",
}


# The command `quantized` trains these.
LOW_BIT = {"quantizers", "quant_layers", "int8", "fp8", "microscaling"}


def test_there_is_a_trial_for_each_estimator_of_the_catalogue():
    estimators = {
        entry.name
        for entry in catalogue.entries()
        if entry.gradient == "surrogate" and entry.family not in {"shaping", "few_bit", *LOW_BIT}
    }
    # FSQ and LFQ are exact but for their rounding; a codebook comes in several ways.
    tried = {name.partition(" (")[0] for name in trials.TRIALS}
    assert estimators - WITHOUT <= tried
    assert tried <= {entry.name for entry in catalogue.entries()}


def test_a_network_learns_through_a_sign_and_its_control_does_not(capsys):
    assert main(["estimators", "SteSign", "--steps", "40", "--seeds", "1"]) == 0
    heading, row, summary = capsys.readouterr().out.strip().splitlines()
    assert heading.split() == ["estimator", "accuracy", "worst", "seed", "control", "ahead", "by"]
    assert row.startswith("SteSign")
    assert summary.startswith("digits, seeds: 1, steps: 40, in ")


def test_what_lets_no_gradient_through_is_a_failure(capsys, monkeypatch):
    same = np.array([0.8, 0.9])
    result = controlled.ControlledResult(same + 0.04, same)
    monkeypatch.setattr(controlled, "train_with_control", lambda *args: result)
    assert main(["estimators", "SteSign", "--markdown"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "| estimator | accuracy | worst seed | control | ahead by |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| SteSign | 89.0 ± 5.0 % | 84.0 % | 85.0 % | 4.0 points |",
    ]
    assert err == (
        "flax-customgrad estimators: less than 5 points ahead of a zero gradient: SteSign\n"
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["SteSine"], "no estimator 'SteSine' to train with; there are round_ste, "),
        (["--steps", "0"], "argument --steps: there must be at least 1, got 0"),
        (["--seeds", "x"], "argument --seeds: expected a whole number, got 'x'"),
    ],
)
def test_bad_arguments(arguments, complaint, capsys):
    assert main(["estimators", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_codebooks_are_trained_and_their_use_is_shown(capsys, monkeypatch):
    ways = {"moving average": {"learning": "ema", "dead_below": 0.1}}
    monkeypatch.setattr(autoencoder, "CODEBOOKS", ways)
    assert main(["codebooks", "--steps", "20", "--seeds", "1"]) == 0
    heading, row, codes, summary = capsys.readouterr().out.strip().splitlines()
    assert heading.split() == [
        "gradient",
        "and",
        "learning",
        "error",
        "codes",
        "used",
        "perplexity",
    ]
    _, error, _, usage, perplexity = re.findall(r"[\d.]+", row.replace("moving", "0"))
    assert 0 < float(error) < 200
    assert 0 < float(usage) <= 100
    assert 1 <= float(perplexity) <= 256
    assert codes.startswith("256 codes")
    assert summary.startswith("digits, seeds: 1, steps: 20")
