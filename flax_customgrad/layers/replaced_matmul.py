"""Checks shared by layers that replace nnx's matmul: with an int8, fp8 or quantized product.

Such a layer cannot call an operation of the user's own, takes floating arrays only, and replaces a
layer that holds the same parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from flax_customgrad.contract.compat import set_class
from flax_customgrad.layers.drop_in import Parameters, parameters, with_own_bias
from flax_customgrad.numerics.dtypes import as_array, is_supported_dtype, is_supported_float

L = TypeVar("L", bound=nnx.Module)

_INJECTABLE = {
    "dot_general": (lax.dot_general,),
    "dot_general_cls": (),
    "einsum_op": (jnp.einsum,),
    "conv_general_dilated": (lax.conv_general_dilated,),
    "promote_dtype": (dtypes.promote_dtype,),
}
"""The operations that a user may inject into a layer of nnx, each with nnx's own defaults."""


def operands(layer: nnx.Module, x: Any, *names: str) -> tuple[Parameters, jax.Array]:
    """The parameters and the input of a layer, checked, as an operation takes them.

    Args:
        layer: the layer.
        x: the input of the layer, a floating array of JAX or NumPy.
        *names: names of the parameters; one that the layer does without is left out.

    Returns:
        The parameters as bare arrays, and x as an array of JAX.

    Raises:
        TypeError: x or a parameter is not a real floating array of 16 bits or more.
    """
    return checked(layer, parameters(layer, *names), x)


def checked(layer: Any, params: Parameters, x: Any) -> tuple[Parameters, jax.Array]:
    """Checks that parameters and input can be quantized.

    Args:
        layer: the layer that they belong to, for the error.
        params: the parameters of the layer.
        x: the input of the layer, a floating array of JAX or NumPy.

    Returns:
        `params`, with a bias of the layer's own shape, and x as an array of JAX.

    Raises:
        TypeError: x or a parameter is not a real floating array of 16 bits or more, or the dtype
            of the layer is none of one.
        ValueError: the bias does not broadcast to that of the constructor.
    """
    x, dtype = as_array(x), getattr(layer, "dtype", None)
    if dtype is not None and not is_supported_dtype(dtype):
        raise TypeError(
            f"{type(layer).__name__}: dtype={dtype!r} is none of float16, bfloat16, float32 and "
            "float64, in which it can compute"
        )
    for name, array in {**params, "its input": x}.items():
        if not is_supported_float(array):
            raise TypeError(
                f"{type(layer).__name__} quantizes float16, bfloat16, float32 and float64; {name} "
                f"is {getattr(array, 'dtype', type(array).__name__)}: cast it first"
            )
    # An Einsum gives the elements of its bias the shape that the equation says, as nnx does.
    if "bias" in params and not isinstance(layer, nnx.Einsum):
        params = with_own_bias(layer, params, _bias_shape(layer, params["kernel"].shape))
    return params, x


def _bias_shape(layer: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the bias that the constructor of a layer makes for a kernel."""
    if isinstance(layer, nnx.LinearGeneral):
        return (*kernel[: len(layer.batch_axis)], *layer.out_features)
    if isinstance(layer, nnx.ConvTranspose):
        return (layer.out_features,)
    return kernel[-1:]


@contextmanager
def adopted(cls: type[L], layer: Any, reference: type) -> Iterator[L]:
    """Turns a layer of nnx, or a drop-in, into another class with the same parameters, in place.

    What the class has beyond its parameters is set inside of the context; if that fails, the layer
    is what it was.

    Args:
        cls: the class that the layer becomes.
        layer: the layer.
        reference: the class of nnx that the layer must be an instance of.

    Returns:
        A context manager, which gives the layer itself.

    Raises:
        TypeError: the layer is not an instance of `reference`, or its class has a `__call__` of
            its own, which `cls` would not run.
        ValueError: an operation was injected into the layer.
    """
    if not isinstance(layer, reference):
        raise TypeError(
            f"{cls.__name__}.from_layer takes an nnx.{reference.__name__}, got a "
            f"{type(layer).__name__}"
        )
    if type(layer).__call__ not in {vars(base).get("__call__") for base in cls.__mro__}:
        raise TypeError(
            f"{cls.__name__}.from_layer: a {type(layer).__name__} has a `__call__` of its own, "
            f"which would be lost; pass an nnx.{reference.__name__}"
        )
    refuse_injected(cls.__name__, layer)
    before, held = type(layer), dict(vars(layer))
    set_class(layer, cls)
    try:
        yield layer
    except BaseException:
        set_class(layer, before)
        vars(layer).clear()
        vars(layer).update(held)
        raise


def refuse_injected(name: str, layer: Any) -> None:
    """Refuses a layer with an injected operation, which this library would not call.

    Args:
        name: the name of the class, for the error.
        layer: the layer.

    Raises:
        ValueError: an operation was injected into the layer.
    """
    for attribute in injected_operations(layer):
        raise ValueError(
            f"{name} computes its product itself and cannot call `{attribute}`: leave it out"
        )


def injected_operations(layer: Any) -> list[str]:
    """The attributes of a layer that hold an operation of the user's own.

    Args:
        layer: the layer.
    """
    return [
        attribute
        for attribute, defaults in _INJECTABLE.items()
        if getattr(layer, attribute, None) not in (None, *defaults)
    ]
