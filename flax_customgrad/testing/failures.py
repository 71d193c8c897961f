"""What an exception inside a check says: its text, its notes, and the user's lines it came from."""

import traceback
from pathlib import Path

import chex
import flax
import jax
import numpy

import flax_customgrad

# Code that a user does not look for a mistake in. The layers of this library are no part of it.
_MACHINERY = (
    *(Path(package.__path__[0]) for package in (jax, flax, numpy, chex)),
    *(Path(flax_customgrad.__path__[0]) / folder for folder in ("contract", "testing")),
)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, not too long; its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def summary(error: BaseException) -> str:
    """One line: the type of an exception, the first line of its text, and where it was raised."""
    frames = _frames(error)
    where = f" ({_place(frames[-1])})" if frames else ""
    return f"raised {type(error).__name__}: {first_line(error)}{where}"


def details(error: BaseException) -> str:
    """The traceback of an exception, without the code of JAX and of this library's contract.

    Returns:
        The lines of the user's code, the whole text of the exception, and its notes.
    """
    lines = traceback.format_list(_frames(error)) + traceback.format_exception_only(error)
    text = "".join(lines)
    for note in getattr(error, "__notes__", ()):
        if "JAX has removed its internal frames" in note:  # so have we
            text = text.replace(note, "")
    return text.rstrip()


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The user's code that an exception, or else its cause, came from."""
    raised: BaseException | None = error
    found: list[traceback.FrameSummary] = []
    while raised is not None:
        frames = [f for f in traceback.extract_tb(raised.__traceback__) if _is_users(f)]
        # The cause was raised further inside, such as in the backward.
        found = frames or found
        raised = raised.__cause__
    return found


def _is_users(frame: traceback.FrameSummary) -> bool:
    path = Path(frame.filename)
    return not any(path.is_relative_to(folder) for folder in _MACHINERY)


def _place(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
