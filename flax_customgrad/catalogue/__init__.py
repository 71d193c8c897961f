"""The catalogue: one entry per layer, which the tests, the command line, benchmarks and docs read.

An entry records what a layer is, its source and what its backward keeps, and makes examples of it:
small ones on which its gradient is checked, and workloads on which it is timed. The entries of a
family are in its folder, in `entries.py`.
"""

import difflib
from collections.abc import Callable
from typing import Any

from flax import nnx

from flax_customgrad.catalogue.expected_gradient import expected
from flax_customgrad.estimators.categorical import entries as categorical
from flax_customgrad.estimators.codebook import entries as codebook
from flax_customgrad.estimators.rounding import entries as rounding
from flax_customgrad.estimators.sparse import entries as sparse
from flax_customgrad.estimators.spiking import entries as spiking
from flax_customgrad.gradients.feedback import entries as feedback
from flax_customgrad.gradients.few_bit import entries as few_bit
from flax_customgrad.gradients.shaping import entries as shaping
from flax_customgrad.layers.activation import entries as activation
from flax_customgrad.layers.attention import entries as attention
from flax_customgrad.layers.conv import entries as conv
from flax_customgrad.layers.dropout import entries as dropout
from flax_customgrad.layers.invertible import entries as invertible
from flax_customgrad.layers.linear import entries as linear
from flax_customgrad.layers.losses import entries as losses
from flax_customgrad.layers.normalization import entries as normalization
from flax_customgrad.layers.pooling import entries as pooling
from flax_customgrad.layers.recurrent import entries as recurrent
from flax_customgrad.layers.weight_norms import entries as weight_norms
from flax_customgrad.low_bit.fp8 import entries as fp8
from flax_customgrad.low_bit.frozen import entries as frozen
from flax_customgrad.low_bit.int8 import entries as int8
from flax_customgrad.low_bit.microscaling import entries as microscaling
from flax_customgrad.low_bit.quant_layers import entries as quant_layers
from flax_customgrad.low_bit.quantizers import entries as quantizers
from flax_customgrad.registry.entry import Curve, Entry, Example
from flax_customgrad.registry.public import publish

_FAMILIES = (
    linear,
    conv,
    pooling,
    normalization,
    weight_norms,
    invertible,
    activation,
    recurrent,
    attention,
    dropout,
    losses,
    rounding,
    categorical,
    codebook,
    sparse,
    fp8,
    quantizers,
    quant_layers,
    frozen,
    microscaling,
    int8,
    spiking,
    shaping,
    feedback,
    few_bit,
)


def entries() -> tuple[Entry, ...]:
    """Every layer of the library, by family."""
    return tuple(entry for family in _FAMILIES for entry in family.ENTRIES)


def find(name: str) -> Entry:
    """The entry of a layer.

    Args:
        name: the public name of the layer; in any case, where that leaves no doubt.

    Raises:
        KeyError: no layer has that name, or several but for case; the error suggests names.
    """
    by_name = {entry.name: entry for entry in entries()}
    if name in by_name:
        return by_name[name]
    alike = [known for known in by_name if known.lower() == name.lower()]
    if len(alike) == 1:
        return by_name[alike[0]]
    lower = {known.lower(): known for known in by_name}
    close = alike or [lower[k] for k in difflib.get_close_matches(name.lower(), lower)]
    hint = f": did you mean {' or '.join(close)}?" if close else ""
    raise KeyError(
        f"no layer {name!r}{hint or '; `python -m flax_customgrad list` shows the names'}"
    )


def drop_ins() -> dict[type[nnx.Module], Any]:
    """Maps each flax.nnx layer to the Module of this library that replaces it."""
    return {e.reference: e.module for e in entries() if e.is_drop_in and not e.is_function}  # type: ignore[misc]


def drop_in_functions() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Maps each function of flax.nnx or jax.nn to the function of this library that replaces it."""
    return {e.reference: e.module for e in entries() if e.is_function and e.reference is not None}


__all__ = [
    "Curve",
    "Entry",
    "Example",
    "drop_in_functions",
    "drop_ins",
    "entries",
    "expected",
    "find",
]

publish(globals(), __all__)
