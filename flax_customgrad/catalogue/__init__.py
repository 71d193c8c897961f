"""The catalogue: one entry per layer, which the tests, the command line, benchmarks and docs read.

An entry says what a layer is, where it comes from and what its backward keeps, and makes examples
of it: small ones on which its gradient is proved, and workloads on which it is timed.
"""

from typing import Any

from flax import nnx

from flax_customgrad.catalogue.activation import ACTIVATION
from flax_customgrad.catalogue.categorical import CATEGORICAL
from flax_customgrad.catalogue.codebook import CODEBOOK
from flax_customgrad.catalogue.conv import CONV
from flax_customgrad.catalogue.entry import Curve as Curve
from flax_customgrad.catalogue.entry import Entry as Entry
from flax_customgrad.catalogue.entry import Example as Example
from flax_customgrad.catalogue.feedback import FEEDBACK
from flax_customgrad.catalogue.fp8 import FP8
from flax_customgrad.catalogue.frozen import FROZEN
from flax_customgrad.catalogue.int8 import INT8
from flax_customgrad.catalogue.linear import LINEAR
from flax_customgrad.catalogue.microscaling import MICROSCALING
from flax_customgrad.catalogue.normalization import NORMALIZATION
from flax_customgrad.catalogue.pooling import POOLING
from flax_customgrad.catalogue.quantized import QUANTIZED
from flax_customgrad.catalogue.quantizers import QUANTIZERS
from flax_customgrad.catalogue.shaping import SHAPING
from flax_customgrad.catalogue.sparse import SPARSE
from flax_customgrad.catalogue.spiking import SPIKING
from flax_customgrad.catalogue.straight_through import STRAIGHT_THROUGH
from flax_customgrad.catalogue.weights import WEIGHTS


def entries() -> tuple[Entry, ...]:
    """Every layer of the library, by family."""
    return (
        *LINEAR,
        *CONV,
        *POOLING,
        *NORMALIZATION,
        *WEIGHTS,
        *ACTIVATION,
        *STRAIGHT_THROUGH,
        *CATEGORICAL,
        *CODEBOOK,
        *SPARSE,
        *FP8,
        *QUANTIZERS,
        *QUANTIZED,
        *FROZEN,
        *MICROSCALING,
        *INT8,
        *SPIKING,
        *SHAPING,
        *FEEDBACK,
    )


def find(name: str) -> Entry:
    """The entry of a layer.

    Raises:
        KeyError: there is none; the error lists the names.
    """
    for entry in entries():
        if entry.name == name:
            return entry
    raise KeyError(f"no layer {name!r}; there are {', '.join(e.name for e in entries())}")


def drop_ins() -> dict[type[nnx.Module], Any]:
    """From each flax.nnx layer to the Module of this library that takes its place."""
    return {e.reference: e.module for e in entries() if e.is_drop_in and not e.is_function}  # type: ignore[misc]
