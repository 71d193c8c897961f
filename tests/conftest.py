"""Eight CPU devices, so that meshes are real, and a cache of compiled programs; set before JAX.

LLVM optimizes nothing: the programs of the tests are small and many, and a third of the time went
into code that runs once. What XLA fuses and how much memory it takes is decided before LLVM.

What one run compiles serves the next, and the processes of one run each other: every program, since
there are many small ones. The cache is of this kind of processor, as the programs are;
`JAX_COMPILATION_CACHE_DIR` puts it elsewhere.

Python's garbage collector looks rarely: most of what it would walk through, programs and what they
were traced from, stays. At its usual pace it takes a tenth of the time.

`--half=even` and `--half=odd` are the halves of the cases of each parametrized test. `.ci/run`
takes one on each of the two software stacks: each test runs on both, each case on one. The cases of
several parameters alternate like the fields of a chessboard: each value of each is in both halves.
"""

import collections
import gc
import hashlib
import os
import platform
import re
from pathlib import Path


def _processor():
    """What tells this kind of processor from others, short enough for the name of a folder."""
    about = Path("/proc/cpuinfo")
    features = [line for line in about.read_text().splitlines() if line.startswith("flags")]
    return hashlib.sha256(f"{platform.machine()} {features[:1]}".encode()).hexdigest()[:8]


gc.set_threshold(100_000, 10, 10)

os.environ["JAX_PLATFORMS"] = "cpu"
# Flags are part of a program's key in the cache. A worker inherits them, and adds none.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if flags not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
if Path("/proc/cpuinfo").exists():
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(caches / "flax-customgrad" / _processor())
    )
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_addoption(parser):
    parser.addoption(
        "--half", choices=["even", "odd"], help="half of the cases of each parametrized test"
    )


def pytest_collection_modifyitems(config, items):
    half = config.getoption("half")
    if half is None:
        return
    halves, kept, left_out = _halves(items), [], []
    of_test = collections.defaultdict(set)
    for item in items:
        of_test[_test(item)].add(halves[item])
    for item in items:
        is_kept = halves[item] == half or half not in of_test[_test(item)]
        is_kept = is_kept or item.get_closest_marker("every_stack")
        (kept if is_kept else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


def _halves(items):
    """The half of each case: that of the number of its value, summed over the parameters."""
    halves, numbers = {}, collections.defaultdict(dict)
    for item in items:
        total = 0
        for names in _parameters(item):
            values = tuple(id(item.callspec.params[name]) for name in names)
            number = numbers[_test(item), names]
            total += number.setdefault(values, len(number))
        halves[item] = ("even", "odd")[total % 2]
    return halves


def _parameters(item):
    """The names of what is parametrized, those together that are so."""
    if not hasattr(item, "callspec"):
        return []
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    names = [tuple(re.findall(r"\w+", n)) if isinstance(n, str) else tuple(n) for n in names]
    of_fixtures = set(item.callspec.params).difference(*names)
    return [*names, *((name,) for name in sorted(of_fixtures))]


def _test(item):
    return item.nodeid.partition("[")[0]
