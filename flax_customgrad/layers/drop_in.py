"""What the drop-ins share: layers that take the place of one of flax.nnx.

A drop-in subclasses the layer of nnx and holds nothing more, so that one can become the other. Its
`__call__` hands its parameters to an operation with a hand-written backward, where that applies,
and otherwise calls nnx's own.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from flax_customgrad.numerics import dtypes

Parameters = Mapping[str, jax.Array]
"""An `nnx.State` of exactly the parameters that an operation differentiates, as bare arrays."""


def parameters(layer: nnx.Module, *names: str) -> Parameters:
    """The values of a layer's parameters by name; one that the layer does without is left out."""
    variables = {name: getattr(layer, name) for name in names}
    return nnx.State({name: v[...] for name, v in variables.items() if v is not None})


def has_custom_backward(inputs: Any, params: Parameters) -> bool:
    """Whether the hand-written backwards apply to an input and a layer's parameters."""
    return dtypes.takes_custom_backward(dtypes.as_array(inputs), *params.values())
