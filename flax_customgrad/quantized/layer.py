"""What the quantized layers share: their quantizers, and how operands go through them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from flax_customgrad.arrays import as_array, is_taken
from flax_customgrad.drop_in import Parameters, become, parameters, shown
from flax_customgrad.quantized.codes import Codes
from flax_customgrad.quantized.packed_kernel import PackedKernel
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


class Quantized:
    """Mixed into a layer with a kernel, which, and its input, then go through quantizers.

    It comes after the layer among the bases: only then can a layer of nnx become one of these.

    Attributes:
        weight: the quantizer of the kernel, or None.
        activation: the quantizer of the input, or None.
        gradient: the layer that the output goes through for the sake of its gradient, or None.
        residuals: what is kept between the passes, "quantized" or "original".
    """

    __slots__ = ()
    weight: Quantizer | None
    activation: Quantizer | None
    gradient: Shaper | None
    residuals: Keeping

    _kernel: ClassVar[str] = "kernel"
    """What the kernel is called."""
    _defaults: ClassVar[Mapping[str, Callable[[], Quantizer]]] = {}
    """What makes the quantizers that are not given, by argument."""

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Module,
        *,
        weight: Quantizer | None = None,
        activation: Quantizer | None = None,
        gradient: Shaper | None = None,
        residuals: Keeping = "quantized",
    ) -> Self:
        """Turns a layer of nnx, or a drop-in, into a quantized one, in place.

        Args:
            layer: of the class of nnx that this one subclasses.
            weight: as for the constructor.
            activation: as for the constructor.
            gradient: as for the constructor.
            residuals: as for the constructor.

        Raises:
            TypeError: it is another layer, or a quantizer is none.
            ValueError: an operation is injected, or `residuals` is another word.
        """
        quantized: Any = adopt(cls, layer, _of_nnx(cls))  # type: ignore[type-var]
        quantized._set_quantizers(weight, activation, gradient, residuals)
        return quantized

    def _set_quantizers(
        self,
        weight: Quantizer | None,
        activation: Quantizer | None,
        gradient: Shaper | None,
        residuals: Keeping,
    ) -> None:
        """Gives the layer its quantizers; that of the weights observes them."""
        name = type(self).__name__
        given = {"weight": weight, "activation": activation}
        for argument, quantizer in given.items():
            if quantizer is None and argument in self._defaults:
                given[argument] = self._defaults[argument]()
            elif quantizer is not None and not isinstance(quantizer, Quantizer):
                raise TypeError(
                    f"{name}: {argument}={quantizer!r} must be a quantizer, such as "
                    "flax_customgrad.FakeQuant(bits=8), or None"
                )
        if gradient is not None and not callable(gradient):
            raise TypeError(f"{name}: gradient={gradient!r} must be a layer to call, or None")
        if residuals not in ("quantized", "original"):
            raise ValueError(f'{name}: residuals={residuals!r} must be "quantized" or "original"')
        self.weight = nnx.data(given["weight"])
        self.activation = nnx.data(given["activation"])
        self.gradient = nnx.data(None) if gradient is None else gradient
        self.residuals = residuals
        if self.weight is not None:
            self.weight.observe(self.to_quantize())

    def to_quantize(self) -> jax.Array:
        """What the quantizer of the weights is given: the kernel, times its mask."""
        return self._parameters()[self._kernel]

    def pack_weights(self) -> bool:
        """Puts the codes of the weights in their place; see `flax_customgrad.pack`.

        Returns:
            Whether there is a quantizer for them.
        """
        if self.weight is None:
            return False
        setattr(self, self._kernel, PackedKernel(self.to_quantize(), self.weight))
        self.weight = nnx.data(None)
        return True

    def unpack_weights(self) -> bool:
        """Puts a Param and its quantizer in the place of codes; see `flax_customgrad.unpack`.

        Returns:
            Whether there are codes.
        """
        packed = getattr(self, self._kernel)
        if not isinstance(packed, PackedKernel):
            return False
        setattr(self, self._kernel, nnx.Param(packed[...]))
        self.weight = packed.quantizer
        return True

    def _parameters(self) -> Parameters:
        """The parameters of the product."""
        return parameters(self, self._kernel, "bias")  # type: ignore[arg-type]

    def _operands(self, x: Any) -> tuple[Parameters, jax.Array]:
        """The parameters and the input, as they go into the product."""
        return checked(self, self._parameters(), x)

    def _product(
        self, params: Parameters, x: jax.Array, op: Callable[..., jax.Array], *statics: Any
    ) -> jax.Array:
        """The output: an operation of quantized operands.

        Args:
            params: the parameters.
            x: the input.
            op: the operation, called as `op(params, x, *statics)`.
            *statics: its choices that are not arrays.
        """
        kernel = params[self._kernel]
        quantized = [_quantized(self.weight, kernel), _quantized(self.activation, x)]
        values = [a.values if isinstance(a, Codes) else a for a in quantized]
        kept = quantized if self.residuals == "quantized" else [kernel, x]
        params = nnx.State({**params, self._kernel: values[0]})
        return self._shaped(product(params, values[1], *kept, Map(op, statics, self._kernel)))

    def _shaped(self, y: jax.Array) -> jax.Array:
        """The output, with a gradient of another shape."""
        return y if self.gradient is None else self.gradient(y)


def quantizing(of: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Puts quantizers beside the arguments of a constructor.

    Args:
        of: the constructor of nnx, whose signature is shown.

    Returns:
        A decorator, of a constructor that takes what that of nnx does. It raises a TypeError where
        a quantizer is none, and a ValueError where `residuals` is another word or an operation is
        injected.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        def with_quantizers(
            self: Quantized,
            *args: Any,
            weight: Quantizer | None = None,
            activation: Quantizer | None = None,
            gradient: Shaper | None = None,
            residuals: Keeping = "quantized",
            **kwargs: Any,
        ) -> None:
            init(self, *args, **kwargs)
            refuse_injected(type(self).__name__, self)
            self._set_quantizers(weight, activation, gradient, residuals)

        signature = shown(of, with_quantizers)
        functools.update_wrapper(with_quantizers, of)
        with_quantizers.__signature__ = signature  # type: ignore[attr-defined]
        return with_quantizers

    return decorate


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
    """Operands that a quantizer can take.

    Args:
        layer: whose they are, for the error.
        params: its parameters.
        x: its input; an array of NumPy is taken too.

    Raises:
        TypeError: the input or a parameter is no real floating array.
    """
    x = as_array(x)
    for name, array in {**params, "its input": x}.items():
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


def _of_nnx(cls: type) -> type:
    """The class of nnx that a class subclasses."""
    return next(base for base in cls.__mro__ if getattr(nnx, base.__name__, None) is base)


def _quantized(quantizer: Quantizer | None, a: jax.Array) -> Codes | jax.Array:
    return a if quantizer is None else quantizer.quantize(a)
