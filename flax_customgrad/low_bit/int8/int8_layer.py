"""What the int8 layers share: their arguments, and how their kernel is packed."""

from typing import Any, Literal, get_args

from flax import nnx

from flax_customgrad.layers.drop_in import Parameters, parameters
from flax_customgrad.low_bit.int8.int8_codes import Int8
from flax_customgrad.low_bit.int8.int8_kernel import Int8Kernel
from flax_customgrad.low_bit.int8.int8_product import Rounding, encode_kernel
from flax_customgrad.numerics.argument_checks import check_word
from flax_customgrad.numerics.noise_stream import fork_stream
from flax_customgrad.numerics.products import MatmulConfig

Backward = Literal["float", "int8", "switchback"]
Residuals = Literal["quantized", "original"]
ActivationScale = Literal["per_row", "per_tensor"]
WeightScale = Literal["per_channel", "per_tensor"]


def checked_rounding(
    name: str,
    *,
    backward: Backward = "float",
    residuals: Residuals | None = None,
    activation_scale: ActivationScale = "per_row",
    weight_scale: WeightScale | None = None,
    stochastic_rounding: bool = False,
    rng_collection: str = "noise",
    rngs: nnx.Rngs | None = None,
) -> tuple[Rounding, nnx.RngStream | None]:
    """What a layer rounds, and the stream that it draws noise from, or None.

    Args:
        name: the name of the layer, for errors.
        backward: "float", "int8" or "switchback".
        residuals: "quantized" or "original"; by default the former, and the latter for switchback.
        activation_scale: "per_row" or "per_tensor".
        weight_scale: "per_channel" or "per_tensor"; by default the former, and the latter for
            switchback.
        stochastic_rounding: whether gradients are rounded stochastically.
        rng_collection: the stream of `rngs` to draw noise from.
        rngs: the streams.

    Raises:
        ValueError: an argument is another word, or does not go with the backward.
    """
    switchback = backward == "switchback"
    residuals = residuals or ("original" if switchback else "quantized")
    weight_scale = weight_scale or ("per_tensor" if switchback else "per_channel")
    for argument, value, words in (
        ("backward", backward, Backward),
        ("residuals", residuals, Residuals),
        ("activation_scale", activation_scale, ActivationScale),
        ("weight_scale", weight_scale, WeightScale),
    ):
        check_word(name, argument, value, get_args(words))
    if switchback and residuals == "quantized":
        raise ValueError(
            f"{name}: backward='switchback' computes the kernel's gradient from the input as it "
            "came: leave out residuals='quantized'"
        )
    if backward == "int8" and residuals == "original":
        raise ValueError(
            f"{name}: backward='int8' multiplies the codes of the forward: leave out "
            "residuals='original'"
        )
    if stochastic_rounding and backward == "float":
        raise ValueError(
            f"{name}: stochastic_rounding=True rounds gradients, and backward='float' rounds none: "
            "write backward='int8' or backward='switchback'"
        )
    rounding = Rounding(backward, residuals, activation_scale, weight_scale)
    if not stochastic_rounding:
        return rounding, None
    return rounding, fork_stream(f"{name}: stochastic_rounding=True", rng_collection, rngs)


class InInt8:
    """Mixed into a layer that multiplies in int8: its kernel, packed or not.

    Attributes:
        rounding: what is rounded, and with which scales.
    """

    __slots__ = ()
    kernel: Any
    dtype: Any
    rounding: Rounding

    def pack_weights(self) -> bool:
        """Puts the codes of the kernel in its place; see `flax_customgrad.pack`.

        Returns:
            Whether it was not packed before.
        """
        if self._packed is not None:
            return False
        kernel = self._parameters()["kernel"]
        (computed,) = MatmulConfig(self.dtype).promote(kernel)
        self.kernel = Int8Kernel(encode_kernel(computed, self.rounding), kernel.dtype)
        return True

    def unpack_weights(self) -> bool:
        """Puts a Param in the place of the codes; see `flax_customgrad.unpack`.

        Returns:
            Whether there are codes.
        """
        if self._packed is None:
            return False
        self.kernel = nnx.Param(self.kernel[...])
        return True

    @property
    def _packed(self) -> Int8 | None:
        return self.kernel.int8 if isinstance(self.kernel, Int8Kernel) else None

    def _parameters(self) -> Parameters:
        """The parameters of the product."""
        return parameters(self, "kernel", "bias")  # type: ignore[arg-type]
