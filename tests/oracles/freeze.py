"""Writes the reference values of a family: `python tests/oracles/freeze.py spiking`.

`tests/oracles/<family>.py` computes them with independent libraries (the extra `oracles`), whose
versions stand beside the values in `<family>.json`. The tests of the family compare with the file,
in every run; `test_live.py` computes the values anew where the libraries are installed.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent


def module(family: str) -> ModuleType:
    """The module that computes a family's values."""
    spec = importlib.util.spec_from_file_location(f"oracles_{family}", HERE / f"{family}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def frozen(family: str) -> dict[str, Any]:
    """What the file of a family holds: `versions` and `values`."""
    return json.loads((HERE / f"{family}.json").read_text())


def freeze(family: str) -> None:
    """Computes a family's values and writes them."""
    oracle = module(family)
    found = {"versions": oracle.VERSIONS, "values": oracle.values()}
    (HERE / f"{family}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    freeze(sys.argv[1])
