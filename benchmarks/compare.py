"""What became slower, or needs more memory, from one file of measurements to another.

python -m benchmarks.compare OLD.json NEW.json

The files are those of `python -m benchmarks.models --json FILE` or of
`python -m flax_customgrad bench --json FILE`. Compared are the ratios to flax.nnx, which was timed
beside each: they may come from different machines, or from times when there was other work. A row
is worse if its ratio fell by more than 3 percent and the quartiles of the two files do not overlap.
The status is 1 if any is.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

WORSE = 0.97
"""A ratio that fell to less than this part of what it was is worse."""


class Ratio(NamedTuple):
    """The number of flax.nnx divided by ours, median and quartiles: above 1 ours is better."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"x{self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line per row that is worse, the worst first.

    Args:
        arguments: those of the command line; None for the ones given.

    Returns:
        The exit status: 1 if a row is worse.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("old", "new"):
        parser.add_argument(name, type=_measurements, metavar=f"{name.upper()}.json")
    args = parser.parse_args(arguments)
    for name, measured in (("old", args.old), ("new", args.new)):
        of = ", ".join(f"{package} {number}" for package, number in measured["versions"].items())
        print(f"{name}: {measured['machine']}, {measured['date']}, {of}")
    old, new = dict(ratios(args.old)), dict(ratios(args.new))
    both = old.keys() & new.keys()
    worse = sorted(
        (row for row in both if is_worse(old[row], new[row])),
        key=lambda row: (new[row].middle / old[row].middle, row),
    )
    for row in worse:
        print(f"{row:56} {old[row]!s:24} -> {new[row]!s}")
    missing = f"; {len(old.keys() - both)} of the old file are missing" if old.keys() - both else ""
    print(f"{len(worse) or 'none'} of {len(both)} worse{missing}")
    return 1 if worse else 0


def is_worse(old: Ratio, new: Ratio) -> bool:
    """Whether a ratio fell by more than the noise.

    Args:
        old: the ratio before.
        new: the ratio now.
    """
    return new.middle < WORSE * old.middle and new.high < old.low


def ratios(measured: dict[str, Any]) -> Iterator[tuple[str, Ratio]]:
    """The ratios of a file, by what they are of.

    Args:
        measured: what the file holds.
    """
    for row in measured["rows"]:
        if "model" in row:
            yield f"{row['model']}: {row['quantity']}, {row['form']}", _times(row)
            continue
        label = f"{row['layer']}: {row['workload']}"
        yield label, _times(row)
        for memory in ("kept", "temporary"):
            pair = row[f"{memory}_bytes"]
            if pair["baseline"] is not None and pair["ours"] is not None:
                # A layer may keep nothing.
                ratio = max(1, pair["baseline"]) / max(1, pair["ours"])
                yield f"{label}, {memory} memory", Ratio(ratio, ratio, ratio)


def _times(row: dict[str, Any]) -> Ratio:
    return Ratio(row["ratio"], row["low"], row["high"])


def _measurements(text: str) -> dict[str, Any]:
    """Reads a file.

    Raises:
        argparse.ArgumentTypeError: it cannot be read, or holds no measurements.
    """
    try:
        measured = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error}") from None
    rows = measured.get("rows", ()) if isinstance(measured, dict) else ()
    if not rows or not all("ratio" in row for row in rows):
        raise argparse.ArgumentTypeError(
            f"{text} was saved neither by benchmarks.models nor by bench: it has no rows with a "
            "ratio to flax.nnx"
        )
    return measured


if __name__ == "__main__":
    sys.exit(main())
