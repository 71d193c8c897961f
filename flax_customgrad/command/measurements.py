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
    """The name of the processor; its architecture where the system does not say more."""
    try:
        model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _versions(others: Iterable[str]) -> dict[str, str]:
    packages = {name: version(name) for name in (*_PACKAGES, *others)}
    return {"Python": platform.python_version(), **packages}
