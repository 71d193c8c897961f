"""Two processes train as one does, and one reads what two wrote."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

PROGRAM = Path(__file__).parents[2] / "docs" / "guides" / "several_processes.py"
_spec = importlib.util.spec_from_file_location("several_processes", PROGRAM)
several_processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(several_processes)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="on one of the stacks, for its time")
def test_two_processes_compute_what_one_does_and_one_reads_their_checkpoint(tmp_path):
    folder = tmp_path / "model"
    command = [sys.executable, PROGRAM, "--processes", "2", "--steps", "2", "--checkpoint", folder]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert "processes: 2, devices: 4" in run.stdout
    losses = re.search(r"^losses: (.*)", run.stdout, re.M)[1].split()
    # Each wrote its part.
    assert len(list(folder.glob("ocdbt.process_*"))) == 2

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    expected = several_processes.train(mesh, 3)
    np.testing.assert_allclose(list(map(float, losses)), expected[:2], rtol=1e-5)
    resumed = several_processes.train(mesh, 1, restore=folder)
    np.testing.assert_allclose(resumed, expected[2:], rtol=1e-5)
