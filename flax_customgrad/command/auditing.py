"""Shows what the backward of a model keeps for each layer, with flax.nnx and with ours.

The model is made by a function of your own, which is named as `package.module:function`.
"""

import argparse
import contextlib
import difflib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from flax_customgrad.command import common
from flax_customgrad.model.audit import audit
from flax_customgrad.model.tree import layers


class _Failure(Exception):
    """What went wrong, in one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `audit` to a parser."""
    parser.add_argument(
        "factory",
        metavar="MODULE:FACTORY",
        help="a function without arguments that returns a model and its inputs, (model, *inputs)",
    )
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the value and gradient too, and show the temporary memory that they take",
    )
    parser.add_argument(
        "--out",
        type=common.picture(".svg", ".png"),
        metavar="FILE",
        help="where to save a picture, FILE.svg or FILE.png",
    )


def run(args: argparse.Namespace) -> int:
    """Audits the model and prints the table.

    Returns:
        The exit status: 2 if there is no such factory, if it returns something else, if the model
        cannot be traced, or if the picture needs a package that is missing; else 0.
    """
    from rich.console import Console

    if args.out is not None and (missing := common.missing_package("plot")):
        return common.print_error("audit", missing)
    try:
        model, *inputs = _made_by(args.factory)
        with _in_one_line(f"{args.factory}: the model cannot be traced on its inputs"):
            report = audit(model, *inputs, compiled=args.compile)
        if args.out is not None:
            report.save(args.out)
    except _Failure as failure:
        return common.print_error("audit", str(failure))
    if args.markdown:
        print(report.to_markdown())
        return 0
    console = Console(highlight=False)
    console.print(report)
    if args.out is not None:
        console.print(f"figure: {args.out}", soft_wrap=True)
    return 0


def _made_by(name: str) -> tuple[Any, ...]:
    """What a factory returns."""
    example = _factory(name)
    with _in_one_line(f"{name}()"):
        made = example()
    if not isinstance(made, tuple) or len(made) < 2:
        raise _Failure(
            f"{name}() returned {_kind(made)}; a factory returns a model and its inputs: "
            "return model, x"
        )
    try:
        layers(made[0])
    except TypeError as error:
        raise _Failure(f"{name}() returned no model in the first place: {error}") from None
    return made


def _factory(name: str) -> Callable[[], Any]:
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise _Failure(f"expected MODULE:FACTORY, such as my_models:small, got {name!r}")
    # As `python -m` does; an installed command does not look where it is called.
    if "" not in sys.path:
        sys.path.insert(0, "")
    with _in_one_line(f"cannot import {module_name!r}"):
        found: Any = importlib.import_module(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, [n for n in dir(found) if n[0] != "_"])
            hint = f": did you mean {' or '.join(close)}?" if close else ""
            raise _Failure(f"there is no {part!r} in {module_name!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise _Failure(f"{name} is no function, but {_kind(found)}")
    return found


@contextlib.contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turns whatever code of the user raises into a failure of one line."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        raise _Failure(f"{what}: {type(error).__name__}: {text}") from error


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__name__}"
