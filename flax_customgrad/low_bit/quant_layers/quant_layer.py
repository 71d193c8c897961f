"""`QuantLayer`: what the quantized layers share, their quantizers and the quantized product."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.contract.compat import is_traced
from flax_customgrad.layers.drop_in import Parameters, parameters
from flax_customgrad.layers.replaced_matmul import adopted, checked, refuse_injected
from flax_customgrad.layers.stacked import repeated, stack, stack_axes, unstack
from flax_customgrad.low_bit.int8.bilinear_op import ProductOfCodes
from flax_customgrad.low_bit.quant_layers.integer_product import integer_product
from flax_customgrad.low_bit.quant_layers.packed_kernel import PackedKernel
from flax_customgrad.low_bit.quant_layers.quantized_bias import int32_bias
from flax_customgrad.low_bit.quant_layers.quantized_product import (
    LinearOp,
    quantized_product,
)
from flax_customgrad.low_bit.quantizers.codes import Codes
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer

KeptOperands = Literal["quantized", "original"]
"""What is kept of the operands of a product: their codes, or the operands as they came."""
QuantizerChoice = Quantizer | Literal["default"] | None
"""A quantizer; "default" for that of the layer's class; None for none."""
BiasQuantizer = Quantizer | Literal["int32"] | None
"""A quantizer; "int32" for multiples of the product of the operands' steps; None for none."""
GradientShaper = Callable[[jax.Array], jax.Array]
"""A layer that changes nothing but the gradient."""


class QuantLayer:
    """Mixed into a layer with a kernel: kernel and input go through quantizers.

    It comes after the layer among the bases: only then can a layer of nnx become one of these.

    Attributes:
        weight: the quantizer of the kernel, or None.
        activation: the quantizer of the input, or None.
        bias_quantizer: the quantizer of the bias, "int32", or None.
        gradient: the layer that the output goes through and that changes its gradient, or None.
        residuals: what is kept of the operands, "quantized" or "original".
    """

    __slots__ = ()
    weight: Quantizer | None
    activation: Quantizer | None
    bias_quantizer: BiasQuantizer
    gradient: GradientShaper | None
    residuals: KeptOperands

    _kernel: ClassVar[str] = "kernel"
    """The name of the parameter that is the kernel."""
    _defaults: ClassVar[Mapping[str, Callable[[], Quantizer]]] = {}
    """By argument, what makes the quantizer of the class; without one "default" means none."""

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Module,
        *,
        weight: QuantizerChoice = "default",
        activation: QuantizerChoice = "default",
        bias: BiasQuantizer = None,
        gradient: GradientShaper | None = None,
        residuals: KeptOperands = "quantized",
    ) -> Self:
        """Turns a layer of nnx, or a drop-in, into a quantized one, in place.

        `layer` itself changes and is returned: pass `nnx.clone(layer)` to keep the original.

        Args:
            layer: a layer of the class of nnx that this one subclasses.
            weight: as for the constructor.
            activation: as for the constructor.
            bias: as for the constructor.
            gradient: as for the constructor.
            residuals: as for the constructor.

        Returns:
            `layer`, which is now of this class.

        Raises:
            TypeError: `layer` is another layer, `weight`, `activation` or `bias` is no `Quantizer`,
                or `gradient` cannot be called.
            ValueError: an operation is injected, `residuals` is neither "quantized" nor "original",
                or `bias` is "int32" and kernel or input have no quantizer.
        """
        quantized: Any
        with adopted(cls, layer, _of_nnx(cls)) as quantized:  # type: ignore[type-var]
            quantized._set_quantizers(weight, activation, gradient, residuals, bias)
        return quantized

    @classmethod
    def has_default_quantizers(cls) -> bool:
        """Whether a layer quantizes something without being handed a quantizer."""
        return bool(cls._defaults)

    def _set_quantizers(
        self,
        weight: QuantizerChoice,
        activation: QuantizerChoice,
        gradient: GradientShaper | None,
        residuals: KeptOperands,
        bias: BiasQuantizer = None,
    ) -> None:
        """Gives the layer its quantizers; those of kernel and bias observe them.

        Raises:
            TypeError: `weight`, `activation` or `bias` is no `Quantizer`, or `gradient` cannot be
                called.
            ValueError: `residuals` is neither "quantized" nor "original", an operation is injected,
                or `bias` is "int32" and kernel or input have no quantizer.
        """
        name = type(self).__name__
        refuse_injected(name, self)
        given: dict[str, Any] = {}
        arguments = {"weight": weight, "activation": activation, "bias": bias}
        for argument, quantizer in arguments.items():
            if argument == "bias" and isinstance(quantizer, str) and quantizer == "int32":
                given[argument] = quantizer
            elif isinstance(quantizer, str) and quantizer == "default":
                make = self._defaults.get(argument)
                given[argument] = None if make is None else make()
            elif quantizer is None or isinstance(quantizer, Quantizer):
                given[argument] = quantizer
            else:
                raise TypeError(
                    f"{name}: {argument}={quantizer!r} must be a quantizer, such as "
                    "flax_customgrad.FakeQuant(bits=8), or None"
                )
        if given["bias"] == "int32" and (given["weight"] is None or given["activation"] is None):
            raise ValueError(
                f'{name}: bias="int32" is in multiples of the product of the steps of input and '
                "kernel: give quantizers for both, `weight` and `activation`"
            )
        if gradient is not None and not callable(gradient):
            raise TypeError(f"{name}: gradient={gradient!r} must be a layer to call, or None")
        if residuals not in ("quantized", "original"):
            raise ValueError(f'{name}: residuals={residuals!r} must be "quantized" or "original"')
        axes = stack_axes(self)
        of_each: dict[str, Any] = {
            name: repeated(module, axes) if isinstance(module, nnx.Module) else module
            for name, module in {**given, "gradient": gradient}.items()
        }
        to_observe = {"weight": self.to_quantize()}
        if (own_bias := getattr(self, "bias", None)) is not None:
            to_observe["bias"] = own_bias[...]
        for argument, array in to_observe.items():
            if isinstance(of_each[argument], Quantizer):
                quantizers = unstack(of_each[argument], axes)
                for index, quantizer in quantizers.items():
                    quantizer.observe_weights(array[index])
                of_each[argument] = stack(quantizers, axes)
        self.weight = nnx.data(of_each["weight"])
        self.activation = nnx.data(of_each["activation"])
        is_word = isinstance(of_each["bias"], str)
        self.bias_quantizer = "int32" if is_word else nnx.data(of_each["bias"])
        self.gradient = nnx.data(None) if gradient is None else of_each["gradient"]
        self.residuals = residuals

    def to_quantize(self) -> jax.Array:
        """The array that the quantizer of the weights quantizes: the kernel, times its mask."""
        return self._parameters()[self._kernel]

    def pack_weights(self) -> bool:
        """Puts the codes of the weights in their place; see `flax_customgrad.pack`.

        Returns:
            Whether there is a quantizer for them, or for the bias, that is enabled.
        """
        axes, changed = stack_axes(self), False
        for name, of in self._packed_together.items():
            quantizer, variable = getattr(self, of), getattr(self, name, None)
            if not isinstance(quantizer, Quantizer) or variable is None:
                continue
            if not quantizer.may_be_enabled:
                continue
            values = self.to_quantize() if name == self._kernel else variable[...]
            packed = {
                index: PackedKernel(values[index], one, variable)
                for index, one in unstack(quantizer, axes).items()
            }
            setattr(self, name, stack(packed, axes))
            setattr(self, of, nnx.data(None))
            changed = True
        return changed

    def unpack_weights(self) -> bool:
        """Puts a Param and its quantizer in the place of codes; see `flax_customgrad.unpack`.

        Returns:
            Whether there are codes.
        """
        changed = False
        for name, of in self._packed_together.items():
            packed = getattr(self, name, None)
            if isinstance(packed, PackedKernel):
                setattr(self, name, packed.to_variable())
                setattr(self, of, packed.quantizer)
                changed = True
        return changed

    @property
    def _packed_together(self) -> dict[str, str]:
        """The parameters that have quantizers, and the names of those."""
        return {self._kernel: "weight", "bias": "bias_quantizer"}

    def _parameters(self) -> Parameters:
        """The parameters of the product."""
        return parameters(self, self._kernel, "bias")  # type: ignore[arg-type]

    def _operands(self, x: Any) -> tuple[Parameters, jax.Array]:
        """The parameters and the input, as they go into the product."""
        return checked(self, self._parameters(), x)

    def _product(
        self,
        params: Parameters,
        x: jax.Array,
        op: Callable[..., jax.Array],
        *statics: Any,
        of_codes: ProductOfCodes | None = None,
    ) -> jax.Array:
        """Applies an operation to quantized operands.

        Args:
            params: the parameters.
            x: the input.
            op: the operation, called as `op(params, x, *statics)`.
            *statics: its arguments that are not arrays.
            of_codes: the same operation, of int8 codes; None where there is none.
        """
        kernel, packed = params[self._kernel], getattr(self, self._kernel)
        quantized = [_quantized(self.weight, kernel), _quantized(self.activation, x)]
        _warn_of_zeros(self, quantized[1], x)
        values = [a.values if isinstance(a, Codes) else a for a in quantized]
        kept: list[Any] = quantized if self.residuals == "quantized" else [kernel, x]
        weights = packed if isinstance(packed, PackedKernel) else quantized[0]
        integers = integer_product(of_codes, quantized[1], weights, x, kernel)
        params = nnx.State(
            {**params, **self._quantized_bias(params, quantized), self._kernel: values[0]}
        )
        linear_op = LinearOp(op, statics, self._kernel)
        return self._shaped(quantized_product(params, values[1], *kept, integers, linear_op))

    def _quantized_bias(self, params: Parameters, operands: list[Any]) -> dict[str, jax.Array]:
        """The bias, quantized, where there are a bias and a quantizer for it."""
        if "bias" not in params or self.bias_quantizer is None:
            return {}
        bias = params["bias"]
        if isinstance(self.bias_quantizer, Quantizer):
            return {"bias": self.bias_quantizer(bias)}
        kernel, x = operands
        packed = getattr(self, self._kernel)
        kernel = packed.decoded if isinstance(packed, PackedKernel) else kernel
        return {"bias": int32_bias(type(self).__name__, bias, x, kernel)}

    def _shaped(self, y: jax.Array) -> jax.Array:
        """The output, whose gradient goes through the layer for it."""
        return y if self.gradient is None else self.gradient(y)


def _of_nnx(cls: type) -> type:
    """The class of nnx that a class subclasses."""
    return next(base for base in cls.__mro__ if getattr(nnx, base.__name__, None) is base)


def _quantized(quantizer: Quantizer | None, a: jax.Array) -> Codes | jax.Array:
    return a if quantizer is None else quantizer.quantize_if_enabled(a)


def _warn_of_zeros(layer: Any, quantized: Codes | jax.Array, x: jax.Array) -> None:
    """Says that a scale, learned or recorded, takes every input to zero; where values are known."""
    if not isinstance(quantized, Codes) or is_traced(quantized.values) or is_traced(x):
        return
    if jnp.any(x) and not jnp.any(quantized.values):
        warnings.warn(
            f"{type(layer).__name__}: its {type(layer.activation).__name__} makes every input "
            f"zero, whose largest magnitude is {jnp.max(jnp.abs(x)):.3g}: its scale was never set, "
            "or for other inputs; call flax_customgrad.calibrate(model, batches)",
            stacklevel=4,
        )
