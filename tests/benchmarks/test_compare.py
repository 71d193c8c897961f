"""`benchmarks.compare`: what is worse, in files of `benchmarks.models` and of `bench`."""

import dataclasses

import pytest

from benchmarks.compare import main
from benchmarks.models import Row
from flax_customgrad.command import measurements
from flax_customgrad.command.benchmark.workloads import Measurement, Pair

STEP = Row("ResNet", "step", "converted", "ms", 10.0, 8.0, 1.25, 1.2, 1.3)
NORM = Measurement(
    "LayerNorm", "norm", "8x4", "nnx", 1.0, 2.0, 1.9, 2.1, Pair(64, 0), Pair(128, 64)
)


def _compared(folder, capsys, old, new):
    for name, measured in (("old", old), ("new", new)):
        measurements.write(folder / f"{name}.json", map(dataclasses.asdict, measured))
    status = main([str(folder / "old.json"), str(folder / "new.json")])
    return status, capsys.readouterr().out.splitlines()


def test_what_stayed_is_not_listed(tmp_path, capsys):
    noisy = dataclasses.replace(STEP, ratio=1.15, low=1.0, high=1.21)
    faster = dataclasses.replace(NORM, ratio=3.0, low=2.9, high=3.1)
    old = [STEP, NORM]
    status, lines = _compared(tmp_path, capsys, old, [noisy, faster])
    assert status == 0
    assert lines[0].startswith("old: ")
    assert ", jax " in lines[0]
    assert lines[2:] == ["none of 4 worse"]


def test_what_is_worse_comes_first_where_it_is_worst(tmp_path, capsys):
    slower = dataclasses.replace(STEP, ratio=1.1, low=1.0, high=1.15)
    halved = dataclasses.replace(
        NORM, ratio=1.0, low=0.9, high=1.1, temporary_bytes=Pair(128, 80), kept_bytes=Pair(64, 32)
    )
    old = [STEP, NORM]
    status, lines = _compared(tmp_path, capsys, old, [slower, halved])
    assert status == 1
    assert [line.split("  ")[0] for line in lines[2:-1]] == [
        "LayerNorm: 8x4, kept memory",
        "LayerNorm: 8x4",
        "LayerNorm: 8x4, temporary memory",
        "ResNet: step, converted",
    ]
    assert "x1.25 [1.20, 1.30] " in lines[-2]
    assert lines[-2].endswith("-> x1.10 [1.00, 1.15]")
    assert lines[-1] == "4 of 4 worse"


def test_rows_that_are_missing_are_counted(tmp_path, capsys):
    status, lines = _compared(tmp_path, capsys, [STEP], [NORM])
    assert status == 0
    assert lines[-1] == "none of 0 worse; 1 of the old file are missing"


@pytest.mark.parametrize("text", ["", "{}", "[]"], ids=["empty", "object", "list"])
def test_other_files_are_refused(tmp_path, capsys, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(SystemExit):
        main([str(file), str(file)])
    assert str(file) in capsys.readouterr().err
