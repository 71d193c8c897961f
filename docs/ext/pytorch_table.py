"""The tables of layers beside PyTorch, of what `benchmarks.layers --torch --json` has saved."""

import itertools
from collections.abc import Iterator
from typing import Any

from flax_customgrad.command.measurements import provenance


def markdown(measured: dict[str, Any]) -> Iterator[str]:
    """The lines of a table for each family, and before them where and when it was measured.

    Args:
        measured: what the file holds.
    """
    yield f"Measured {provenance(measured)}:"
    yield ""
    for family, rows in itertools.groupby(measured["rows"], lambda row: row["family"]):
        title = f"[](/families/{family}.md)"
        yield f"| {title} | ours, ms | PyTorch, ms | PyTorch / ours | flax.nnx / ours |"
        yield "|---|--:|--:|--:|--:|"
        for row in rows:
            best = min(row["others"].values())
            yield (
                f"| `{row['layer']}`: {row['workload']} | {row['milliseconds']:.3g} "
                f"| {best:.3g} | **{best / row['milliseconds']:.2f}** | {row['ratio']:.2f} |"
            )
        yield ""
