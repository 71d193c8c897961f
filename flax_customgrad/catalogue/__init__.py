"""The catalogue: one entry per layer, which the tests, the command line, benchmarks and docs read.

An entry says what a layer is, where it comes from and what its backward keeps, and makes examples
of it: small ones on which its gradient is proved, and workloads on which it is timed.
"""

from typing import Any

from flax import nnx

from flax_customgrad.estimators.categorical.entries import CATEGORICAL
from flax_customgrad.estimators.codebook.entries import CODEBOOK
from flax_customgrad.estimators.rounding.entries import STRAIGHT_THROUGH
from flax_customgrad.estimators.sparse.entries import SPARSE
from flax_customgrad.estimators.spiking.entries import SPIKING
from flax_customgrad.gradients.feedback.entries import FEEDBACK
from flax_customgrad.gradients.shaping.entries import SHAPING
from flax_customgrad.layers.activation.entries import ACTIVATION
from flax_customgrad.layers.conv.entries import CONV
from flax_customgrad.layers.linear.entries import LINEAR
from flax_customgrad.layers.normalization.entries import NORMALIZATION
from flax_customgrad.layers.pooling.entries import POOLING
from flax_customgrad.layers.weight_norms.entries import WEIGHTS
from flax_customgrad.low_bit.fp8.entries import FP8
from flax_customgrad.low_bit.frozen.entries import FROZEN
from flax_customgrad.low_bit.int8.entries import INT8
from flax_customgrad.low_bit.microscaling.entries import MICROSCALING
from flax_customgrad.low_bit.quant_layers.entries import QUANTIZED
from flax_customgrad.low_bit.quantizers.entries import QUANTIZERS
from flax_customgrad.registry.entry import Curve as Curve
from flax_customgrad.registry.entry import Entry as Entry
from flax_customgrad.registry.entry import Example as Example


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
