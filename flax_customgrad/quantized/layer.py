"""What the quantized layers share: their quantizers, and how operands go through them."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from flax_customgrad.arrays import as_array, is_taken
from flax_customgrad.drop_in import Parameters, become, parameters
from flax_customgrad.quantized.codes import Codes
from flax_customgrad.quantized.product import Map, product
from flax_customgrad.quantized.quantizer import Quantizer

L = TypeVar("L", bound=nnx.Module)

_OPERATIONS = {
    "dot_general": (lax.dot_general,),
    "dot_general_cls": (),
    "einsum_op": (jnp.einsum,),
    "conv_general_dilated": (lax.conv_general_dilated,),
    "promote_dtype": (dtypes.promote_dtype,),
}
"""What a user may inject into a layer of nnx, and what stands there by default."""

Keeping = Literal["quantized", "original"]
Shaper = Callable[[jax.Array], jax.Array]
"""A layer that changes nothing but the gradient."""


def set_quantizers(
    layer: Any,
    weight: Quantizer | None,
    activation: Quantizer | None,
    gradient: Shaper | None,
    residuals: Keeping,
    kernel: str = "kernel",
) -> None:
    """Gives a layer its quantizers; that of the weights observes them.

    Args:
        layer: a layer with a Param of the kernel's name.
        weight: quantizes the kernel, or None.
        activation: quantizes the input, or None.
        gradient: a layer applied to the output, which changes its gradient, or None.
        residuals: what is kept between the passes.
        kernel: what the kernel is called.

    Raises:
        TypeError: a quantizer is none.
        ValueError: residuals is another word.
    """
    name = type(layer).__name__
    for argument, quantizer in {"weight": weight, "activation": activation}.items():
        if quantizer is not None and not isinstance(quantizer, Quantizer):
            raise TypeError(
                f"{name}: {argument}={quantizer!r} must be a quantizer, such as "
                "flax_customgrad.FakeQuant(bits=8), or None"
            )
    if gradient is not None and not callable(gradient):
        raise TypeError(f"{name}: gradient={gradient!r} must be a layer to call, or None")
    if residuals not in ("quantized", "original"):
        raise ValueError(f'{name}: residuals={residuals!r} must be "quantized" or "original"')
    layer.weight = nnx.data(weight)
    layer.activation = nnx.data(activation)
    layer.gradient = gradient if isinstance(gradient, nnx.Module) or gradient else nnx.data(None)
    layer.residuals = residuals
    if weight is not None:
        weight.observe(getattr(layer, kernel)[...])


def quantized_product(layer: Any, params: Parameters, x: jax.Array, of: Map) -> jax.Array:
    """The output of a layer whose operands go through its quantizers.

    Args:
        layer: what `set_quantizers` was called on.
        params: the layer's parameters.
        x: its input.
        of: its map.
    """
    kernel = params[of.name]
    quantized = [_quantized(layer.weight, kernel), _quantized(layer.activation, x)]
    values = [a.values if isinstance(a, Codes) else a for a in quantized]
    kept = quantized if layer.residuals == "quantized" else [kernel, x]
    y = product(nnx.State({**params, of.name: values[0]}), values[1], *kept, of)
    return y if layer.gradient is None else layer.gradient(y)


def operands(layer: nnx.Module, x: Any, *names: str) -> tuple[Parameters, jax.Array]:
    """The parameters of a layer and its input, as they go into an operation.

    Args:
        layer: the layer.
        x: its input; an array of NumPy is taken too.
        *names: of its parameters.

    Raises:
        TypeError: the input or a parameter is no real floating array.
    """
    params, x = parameters(layer, *names), as_array(x)
    for name, array in {"its input": x, **params}.items():
        if not is_taken(array):
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
        TypeError: the layer is another one.
        ValueError: it has an operation of the user's own.
    """
    if not isinstance(layer, reference):
        raise TypeError(
            f"{cls.__name__}.from_layer takes an nnx.{reference.__name__}, got a "
            f"{type(layer).__name__}"
        )
    refuse_injected(cls.__name__, layer)
    become(layer, cls)
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


def _quantized(quantizer: Quantizer | None, a: jax.Array) -> Codes | jax.Array:
    return a if quantizer is None else quantizer.quantize(a)
