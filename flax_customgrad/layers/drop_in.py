"""Drop-ins: what is shared by layers that replace one of flax.nnx.

A drop-in subclasses the layer of nnx and holds nothing more, so that one can become the other. Its
`__call__` passes its parameters to an operation with a hand-written backward where that applies,
and calls nnx's own `__call__` otherwise.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes as nnx_dtypes

from flax_customgrad.numerics import dtypes
from flax_customgrad.numerics.broadcasting import broadcasts
from flax_customgrad.numerics.interception import products_are_intercepted
from flax_customgrad.numerics.sizes import is_known

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


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that a caller gave, those that are not None, to call nnx as it was called.

    Tools such as exporters put calls of their own in the place of nnx's, which take no others.
    """
    return {name: value for name, value in arguments.items() if value is not None}


def has_custom_backward(inputs: Any, params: Parameters, dtype: Any = None) -> bool:
    """Whether the hand-written backwards apply to an input and a layer's parameters.

    They apply to real floating arrays of 16 bits or more, and outside of `use_autodiff`.

    Args:
        inputs: what the layer was called with; an array of NumPy or a Variable counts as an array.
        params: the parameters of the layer, arrays of any shape.
        dtype: dtype of the layer, None for the promoted one.
    """
    return dtypes.takes_custom_backward(dtypes.as_array(inputs), *params.values(), dtype=dtype)


def has_custom_product(layer: Any, inputs: Any, params: Parameters) -> bool:
    """Whether the hand-written backward of a layer that multiplies by a kernel applies.

    It does not where the user, or a tool, has the layer compute by something else.

    Args:
        layer: a layer of nnx with a kernel.
        inputs: what the layer was called with.
        params: the parameters of the layer, arrays of any shape.
    """
    result = getattr(layer, "preferred_element_type", None)
    return (
        layer.promote_dtype is nnx_dtypes.promote_dtype
        and has_custom_backward(inputs, params, layer.dtype)
        and (result is None or dtypes.is_supported_dtype(result))
        and not products_are_intercepted()
    )


def has_known_size(array: jax.Array, rank: int) -> bool:
    """Whether the space of images is known in numbers; `jax.export` may leave it symbolic.

    What is written out for a size is not there for all sizes, so such images are left to nnx. A
    batch may be symbolic.

    Args:
        array: images of shape (..., *space, features).
        rank: the number of axes of space.
    """
    return all(map(is_known, array.shape[-1 - rank : -1]))


def has_own_bias(layer: Any, params: Parameters, shape: tuple[int, ...]) -> bool:
    """Whether a layer has no bias, or one as its constructor makes it.

    With another one, put in by hand, and where `use_bias` was set to False afterwards, the layer
    is left to nnx.

    Args:
        layer: a layer of nnx, which has `use_bias`.
        params: its parameters.
        shape: the shape of the bias that its constructor makes for its kernel.
    """
    bias = params.get("bias")
    return bias is None or (bool(layer.use_bias) and bias.shape == shape)


def with_own_bias(layer: Any, params: Parameters, shape: tuple[int, ...]) -> Parameters:
    """The parameters of a layer that is not left to nnx, with a bias as its constructor makes it.

    One that was put in by hand is broadcast, as nnx does; one that `use_bias` switches off is left
    out.

    Args:
        layer: a layer with `use_bias`.
        params: its parameters.
        shape: the shape of the bias that its constructor makes for its kernel.

    Raises:
        ValueError: the bias does not broadcast to that shape.
    """
    if has_own_bias(layer, params, shape):
        return params
    others = {name: p for name, p in params.items() if name != "bias"}
    if not layer.use_bias:
        return nnx.State(others)
    bias = params["bias"]
    while bias.ndim > len(shape) and bias.shape[0] == 1:
        bias = bias[0]
    if not broadcasts(bias.shape, shape):
        raise ValueError(
            f"{type(layer).__name__}: the bias has shape {params['bias'].shape}, which does not "
            f"broadcast to {shape}: give it that shape when you replace a bias or a kernel"
        )
    return nnx.State({**others, "bias": jnp.broadcast_to(bias, shape)})
