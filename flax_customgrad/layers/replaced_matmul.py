"""What layers share whose product is their point: int8, fp8 or quantized, it is not nnx's.

Such a layer cannot call an operation of the user's own, takes floating arrays only, and takes the
place of a layer that holds the same parameters.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from flax_customgrad.contract.compat import set_class
from flax_customgrad.layers.drop_in import Parameters, parameters
from flax_customgrad.numerics.dtypes import as_array, is_supported_float

L = TypeVar("L", bound=nnx.Module)

_OPERATIONS = {
    "dot_general": (lax.dot_general,),
    "dot_general_cls": (),
    "einsum_op": (jnp.einsum,),
    "conv_general_dilated": (lax.conv_general_dilated,),
    "promote_dtype": (dtypes.promote_dtype,),
}
"""What a user may inject into a layer of nnx, and what stands there by default."""


def operands(layer: nnx.Module, x: Any, *names: str) -> tuple[Parameters, jax.Array]:
    """The parameters of a layer and its input, as they go into an operation.

    Args:
        layer: the layer.
        x: its input; an array of NumPy is taken too.
        *names: of its parameters.

    Raises:
        TypeError: the input or a parameter is no real floating array.
    """
    return checked(layer, parameters(layer, *names), x)


def checked(layer: Any, params: Parameters, x: Any) -> tuple[Parameters, jax.Array]:
    """Operands that can be quantized.

    Args:
        layer: whose they are, for the error.
        params: its parameters.
        x: its input; an array of NumPy is taken too.

    Raises:
        TypeError: the input or a parameter is no real floating array.
    """
    x = as_array(x)
    for name, array in {**params, "its input": x}.items():
        if not is_supported_float(array):
            raise TypeError(
                f"{type(layer).__name__} quantizes float16, bfloat16, float32 and float64; {name} "
                f"is {getattr(array, 'dtype', type(array).__name__)}: cast it first"
            )
    return params, x


def adopt(cls: type[L], layer: Any, reference: type) -> L:
    """Turns a layer of nnx, or a drop-in, into one of another class that holds the same, in place.

    Args:
        cls: the class.
        layer: the layer.
        reference: the class of nnx that the layer must be one of.

    Raises:
        TypeError: the layer is another one, or computes what this class would not.
        ValueError: it has an operation of the user's own.
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
    set_class(layer, cls)
    return layer


def refuse_injected(name: str, layer: Any) -> None:
    """Refuses a layer with an operation of the user's own: the product is this library's.

    Args:
        name: the class, for the error.
        layer: the layer.

    Raises:
        ValueError: it has one.
    """
    for attribute, own in _OPERATIONS.items():
        if getattr(layer, attribute, None) not in (None, *own):
            raise ValueError(
                f"{name} computes its product itself and cannot call `{attribute}`: leave it out"
            )
