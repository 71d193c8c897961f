"""The frozen reference values are what the libraries compute, where those are installed."""

import importlib
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest

HERE = Path(__file__).parent
FAMILIES = sorted(path.stem for path in HERE.glob("*.json"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("default")
def test_the_libraries_compute_the_frozen_values(family):
    freeze = _freeze()
    oracle, frozen = freeze.module(family), freeze.frozen(family)
    assert frozen["versions"] == oracle.VERSIONS
    for package in oracle.VERSIONS:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    jax.tree.map(
        lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6),
        oracle.values(),
        frozen["values"],
    )


def _freeze():
    spec = importlib.util.spec_from_file_location("freeze", HERE / "freeze.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
