"""`Int8Layer`: what the int8 layers share, their arguments and how their kernel is packed."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import jax
from flax import nnx

from flax_customgrad.layers.drop_in import Parameters, parameters
from flax_customgrad.layers.packed_weights import PackableKernel
from flax_customgrad.layers.replaced_matmul import adopted, refuse_injected
from flax_customgrad.layers.stacked import Index, repeated, stack_axes
from flax_customgrad.low_bit.int8.int8_codes import Int8Array
from flax_customgrad.low_bit.int8.int8_kernel import Int8Kernel
from flax_customgrad.low_bit.int8.int8_product import Int8Rounding, encode_kernel
from flax_customgrad.numerics.argument_checks import check_word
from flax_customgrad.numerics.noise_stream import fork_stream
from flax_customgrad.numerics.products import MatmulConfig

Backward = Literal["float", "int8", "switchback"]
Kept = Literal["quantized", "original"]
ActivationScale = Literal["per_row", "per_tensor"]
WeightScale = Literal["per_channel", "per_tensor"]


@dataclass(frozen=True)
class KernelEncoding:
    """How a layer encodes its kernel.

    Attributes:
        dtype: of the computation, or None.
        rounding: with which scales.
    """

    dtype: Any
    rounding: Int8Rounding

    def __call__(self, kernel: jax.Array) -> Int8Array:
        """The codes and scales of a kernel."""
        (computed,) = MatmulConfig(self.dtype).promote(kernel)
        return encode_kernel(computed, self.rounding)


class Int8Layer(PackableKernel):
    """Mixed into a layer with a kernel, which, and its input, are multiplied in int8.

    It comes after the layer among the bases: only then can a layer of nnx become one of these.

    Attributes:
        rounding: what is rounded, and with which scales.
        noise: the stream that stochastic rounding draws from, or None.
        deterministic: whether it rounds to the nearest, and draws nothing, as in eval mode.
    """

    __slots__ = ()
    _reference: ClassVar[type[nnx.Module]]
    """The layer of nnx that it takes the place of."""
    dtype: Any
    rounding: Int8Rounding
    noise: nnx.RngStream | None
    deterministic: bool

    @classmethod
    def from_layer(
        cls,
        layer: nnx.Module,
        *,
        backward: Backward = "float",
        residuals: Kept | None = None,
        activation_scale: ActivationScale = "per_row",
        weight_scale: WeightScale | None = None,
        stochastic_rounding: bool = False,
        rng_collection: str = "noise",
        rngs: nnx.Rngs | None = None,
    ) -> Self:
        """Turns a layer of nnx, or a drop-in, into one that multiplies in int8, in place.

        `layer` itself changes and is returned: pass `nnx.clone(layer)` to keep the original.

        Args:
            layer: of the class of nnx that this one subclasses, `nnx.Linear` for `Int8Linear`.
            backward: as for the constructor.
            residuals: as for the constructor.
            activation_scale: as for the constructor.
            weight_scale: as for the constructor.
            stochastic_rounding: as for the constructor.
            rng_collection: as for the constructor.
            rngs: random numbers for stochastic rounding alone.

        Returns:
            `layer`, which is now of this class.

        Raises:
            TypeError: the layer is of another class of nnx, or computes something else.
            ValueError: as for the constructor, or stochastic rounding has no `rngs`.
        """
        int8: Any
        with adopted(cls, layer, cls._reference) as int8:  # type: ignore[type-var]
            int8._set_rounding(
                backward,
                residuals,
                activation_scale,
                weight_scale,
                stochastic_rounding,
                rng_collection,
                rngs,
            )
        return int8

    def _set_rounding(
        self,
        backward: Backward,
        residuals: Kept | None,
        activation_scale: ActivationScale,
        weight_scale: WeightScale | None,
        stochastic_rounding: bool,
        rng_collection: str,
        rngs: nnx.Rngs | None,
    ) -> None:
        """Notes down what the layer rounds, or says what is wrong with an argument."""
        name = type(self).__name__
        refuse_injected(name, self)
        switchback = backward == "switchback"
        residuals = residuals or ("original" if switchback else "quantized")
        weight_scale = weight_scale or ("per_tensor" if switchback else "per_channel")
        for argument, value, words in (
            ("backward", backward, Backward),
            ("residuals", residuals, Kept),
            ("activation_scale", activation_scale, ActivationScale),
            ("weight_scale", weight_scale, WeightScale),
        ):
            check_word(name, argument, value, get_args(words))
        if switchback and residuals == "quantized":
            raise ValueError(
                f"{name}: backward='switchback' computes the kernel's gradient from the input as "
                "it came: leave out residuals='quantized'"
            )
        if backward == "int8" and residuals == "original":
            raise ValueError(
                f"{name}: backward='int8' multiplies the codes of the forward: leave out "
                "residuals='original'"
            )
        if stochastic_rounding and backward == "float":
            raise ValueError(
                f"{name}: stochastic_rounding=True rounds gradients, and backward='float' rounds "
                "none: write backward='int8' or backward='switchback'"
            )
        drawing = f"{name}: stochastic_rounding=True"
        self.deterministic = False
        noise = fork_stream(drawing, rng_collection, rngs) if stochastic_rounding else None
        self.noise = None if noise is None else repeated(noise, stack_axes(self))
        self.rounding = Int8Rounding(backward, residuals, activation_scale, weight_scale)

    def _pack_one(self, index: Index) -> Int8Kernel:
        """The codes of a kernel."""
        kernel = self._parameters()["kernel"]
        encode = KernelEncoding(self.dtype, self.rounding)
        return Int8Kernel(encode(kernel[index]), kernel.dtype, self.kernel, encode)

    @property
    def _packed(self) -> Int8Array | None:
        """The codes of a packed kernel."""
        return self.kernel.int8 if isinstance(self.kernel, Int8Kernel) else None

    def _key(self) -> jax.Array | None:
        """What a call rounds its cotangents with; None to round to the nearest."""
        return None if self.noise is None or self.deterministic else self.noise()

    def _parameters(self) -> Parameters:
        """The parameters of the product."""
        return parameters(self, "kernel", "bias")  # type: ignore[arg-type]
