"""What a benchmark saves: its measurements, and what they were made on and with."""

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax
import jax

import flax_customgrad


def save(path: Path, **measurements: Iterable[Any]) -> None:
    """Writes measurements to a file in JSON.

    Args:
        path: the file.
        **measurements: dataclasses, under the name of what they measure.
    """
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "flax_customgrad": flax_customgrad.__version__,
    }
    for name, measured in measurements.items():
        record[name] = [dataclasses.asdict(one) for one in measured]
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    """The name of the processor, where the system tells it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
