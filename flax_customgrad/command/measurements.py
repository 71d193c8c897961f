"""A file of measurements: rows, and on which machine, when and with which versions they were made.

The documentation reads such files from `docs/data`.
"""

import datetime
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "flax")
_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}


def write(path: Path, rows: Iterable[Mapping[str, Any]], others: Iterable[str] = ()) -> None:
    """Writes rows as JSON, one a line, so that a change of a few shows as that.

    Args:
        path: the file; one that is there is replaced.
        rows: what was measured, in values that JSON has.
        others: packages whose versions matter beside those of JAX and Flax.
    """
    head = json.dumps({"machine": machine(), "date": _today(), "versions": _versions(others)})
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')


def provenance(measured: Mapping[str, Any]) -> str:
    """On what machine, with what versions and when something was measured.

    Args:
        measured: what a file holds.
    """
    of = ", ".join(f"{name} {number}" for name, number in measured["versions"].items())
    return f"on {measured['machine']} with {of}, {measured['date']}"


def machine() -> str:
    """The processor or accelerator that JAX computes on, and the number of cores."""
    kind = jax.devices()[0].device_kind
    return f"{_processor() if kind == 'cpu' else kind}, {os.cpu_count()} cores"


def _processor() -> str:
    """The name of the processor and its widest vectors; its architecture where no more is known.

    The names of virtual machines hide the generation, which the vectors tell.
    """
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        about = ""
    model = re.search(r"^model name\s*: (.+)$", about, re.MULTILINE)
    widest = next((name for flag, name in _VECTORS.items() if f" {flag} " in about), None)
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name} with {widest}" if widest else name


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _versions(others: Iterable[str]) -> dict[str, str]:
    packages = {name: version(name) for name in (*_PACKAGES, *others)}
    return {"Python": platform.python_version(), **packages}
