"""`import flax_customgrad` loads what a training script needs; the rest loads when it is used."""

import subprocess
import sys

import pytest

_PROGRAM = """
import sys
from flax import nnx
before = set(sys.modules)
import flax_customgrad as fcg
print(*sorted(set(sys.modules) - before))
for name in ("catalogue", "testing"):
    assert getattr(fcg, name) is sys.modules[f"flax_customgrad.{name}"]
    assert name in dir(fcg)
"""


@pytest.mark.smoke
def test_importing_the_package_loads_no_tools():
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True
    )
    loaded = ran.stdout.split()
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    # chex checks the backwards, and comes with toolz and absl.
    assert packages <= {"flax_customgrad", "chex", "einops", "toolz", "absl", "jax", "flax"}
    ours = {name for name in loaded if name.startswith("flax_customgrad.")}
    assert "flax_customgrad.layers.linear.linear" in ours
    assert not {name for name in ours if name.endswith(".entries")}
    assert not {name for name in ours if name.split(".")[1] in ("catalogue", "testing", "command")}
