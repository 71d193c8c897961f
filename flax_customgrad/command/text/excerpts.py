"""The data: the source of a few modules of Python's standard library, as bytes."""

import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

LENGTH = 64
"""How many bytes an example has."""

_MODULES = (
    *("argparse", "ast", "calendar", "configparser", "csv", "dataclasses", "datetime", "difflib"),
    *("doctest", "enum", "fractions", "functools", "heapq", "inspect", "ipaddress", "mailbox"),
    *("optparse", "pathlib", "pickle", "pprint", "random", "shutil", "statistics", "string"),
    *("subprocess", "tarfile", "textwrap", "threading", "traceback", "typing", "uuid", "zipfile"),
)


class Text(NamedTuple):
    """Excerpts of a text, and what comes next.

    Attributes:
        tokens: bytes, int32 of shape (n, 64).
        labels: the byte after each, int32 of shape (n, 64).
    """

    tokens: np.ndarray
    labels: np.ndarray


def load(seed: int) -> tuple[Text, Text]:
    """Splits the text into excerpts: nine tenths to train on, and the others to test on.

    Args:
        seed: of the split.

    Raises:
        FileNotFoundError: the interpreter comes without the source of its standard library.
    """
    source = np.frombuffer(_source(), np.uint8)
    count = (len(source) - 1) // LENGTH
    tokens, labels = (
        source[start : start + count * LENGTH].reshape(count, LENGTH).astype(np.int32)
        for start in (0, 1)
    )
    order = np.random.default_rng(seed).permutation(count)
    held_out, chosen = np.split(order, [count // 10])
    return Text(tokens[chosen], labels[chosen]), Text(tokens[held_out], labels[held_out])


def _source() -> bytes:
    folder = Path(sysconfig.get_path("stdlib"))
    # In some versions a module is a package.
    paths = [folder / f"{module}.py" for module in _MODULES]
    found = [path.read_bytes() for path in paths if path.is_file()]
    if not found:
        raise FileNotFoundError(f"there is no source of the standard library in {folder}")
    return b"\n".join(found)
