"""Drop-ins: what is shared by layers that replace one of flax.nnx.

A drop-in subclasses the layer of nnx and holds nothing more, so that one can become the other. Its
`__call__` passes its parameters to an operation with a hand-written backward where that applies,
and calls nnx's own `__call__` otherwise.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from flax_customgrad.numerics import dtypes

Parameters = Mapping[str, jax.Array]
"""An `nnx.State` of exactly the parameters that an operation differentiates, as bare arrays."""


def parameters(layer: nnx.Module, *names: str) -> Parameters:
    """The values of a layer's parameters.

    Args:
        layer: the layer.
        *names: names of the parameters; one that is None in the layer is left out.

    Returns:
        A State of bare arrays, keyed by name, with the shapes and dtypes of the parameters.
    """
    variables = {name: getattr(layer, name) for name in names}
    return nnx.State({name: v[...] for name, v in variables.items() if v is not None})


def has_custom_backward(inputs: Any, params: Parameters) -> bool:
    """Whether the hand-written backwards apply to an input and a layer's parameters.

    They apply to real floating arrays of 16 bits or more, and outside of `use_autodiff`.

    Args:
        inputs: what the layer was called with; an array of NumPy or a Variable counts as an array.
        params: the parameters of the layer, arrays of any shape.
    """
    return dtypes.takes_custom_backward(dtypes.as_array(inputs), *params.values())
