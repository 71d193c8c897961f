"""Eight CPU devices, so that meshes are real, and a cache of compiled programs; set before JAX.

LLVM optimizes nothing: the programs of the tests are small and many, and a third of the time went
into code that runs once. What XLA fuses and how much memory it takes is decided before LLVM.

What one run compiles serves the next, and the processes of one run each other: every program, since
there are many small ones. The cache is of this kind of processor, as the programs are;
`JAX_COMPILATION_CACHE_DIR` puts it elsewhere.

`--every-other` leaves out every other case of a parametrized test. `.ci/run` takes it on the second
software stack, where the same tests have run on the first: each test runs on both, and half of the
cases on one.
"""

import collections
import hashlib
import os
import platform
from pathlib import Path


def _processor():
    """What tells this kind of processor from others, short enough for the name of a folder."""
    about = Path("/proc/cpuinfo")
    features = [line for line in about.read_text().splitlines() if line.startswith("flags")]
    return hashlib.sha256(f"{platform.machine()} {features[:1]}".encode()).hexdigest()[:8]


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
if Path("/proc/cpuinfo").exists():
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(caches / "flax-customgrad" / _processor())
    )
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_addoption(parser):
    parser.addoption(
        "--every-other", action="store_true", help="every other case of a parametrized test"
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("every_other"):
        return
    cases, kept, left_out = collections.Counter(), [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        is_kept = cases[test] % 2 == 0 or item.get_closest_marker("every_stack")
        (kept if is_kept else left_out).append(item)
        cases[test] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
