"""What the int8 layers share: their arguments."""

from typing import Literal, get_args

from flax import nnx

from flax_customgrad.int8.product import Rounding

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
        if value not in get_args(words):
            raise ValueError(
                f"{name}: {argument}={value!r} is none of {', '.join(map(repr, get_args(words)))}"
            )
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
    if rngs is None:
        raise ValueError(f"{name}: stochastic_rounding=True draws noise: write rngs=nnx.Rngs(0)")
    return rounding, rngs[rng_collection].fork()
