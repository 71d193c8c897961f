"""The table of layers in a scan, of what `benchmarks.scanned_decoder --json` has saved."""

from collections.abc import Iterator
from typing import Any

from flax_customgrad.command.measurements import provenance


def markdown(measured: dict[str, Any]) -> Iterator[str]:
    """The lines of the table, and before them where and when it was measured.

    Args:
        measured: what the file holds.
    """
    yield f"Measured {provenance(measured)}:"
    yield ""
    yield "| blocks | against flax.nnx | time | temporary memory |"
    yield "|---|--:|--:|--:|"
    for row in measured["rows"]:
        yield (
            f"| {row['form']} | **{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f}) "
            f"| {row['milliseconds'] / 1000:.2f} s | {row['megabytes']:.0f} MB |"
        )
