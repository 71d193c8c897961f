"""What the convolution layers share: arguments per axis, images in one batch, and errors."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from flax_customgrad.layers.drop_in import Parameters, parameters


def per_axis(name: str, value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """An argument of a layer as one number for each axis of space.

    Args:
        name: its name, for the error.
        value: int, a sequence, or None for 1.
        rank: the number of axes.

    Raises:
        ValueError: the sequence is of another length, or a number is below 1.
    """
    numbers = (value or 1,) * rank if isinstance(value, int | None) else tuple(value)
    if len(numbers) != rank or any(n < 1 for n in numbers) or value == 0:
        raise ValueError(
            f"{name}={value!r}; write an int of at least 1, or {rank} of them, one for each axis "
            "of kernel_size"
        )
    return numbers


def parameters_with_mask(layer: nnx.Conv | nnx.ConvTranspose) -> Parameters:
    """The parameters of a layer, its kernel times its mask.

    Args:
        layer: a convolution layer.

    Raises:
        ValueError: the mask has another shape than the kernel.
    """
    params = parameters(layer, "kernel", "bias")
    if layer.mask is None:
        return params
    if layer.mask.shape != layer.kernel_shape:
        raise ValueError(
            f"Mask needs to have the same shape as weights. Shapes are: {layer.mask.shape}, "
            f"{layer.kernel_shape}"
        )
    return nnx.State({**params, "kernel": params["kernel"] * layer.mask})


def in_one_batch(run: Callable[[jax.Array], jax.Array], inputs: jax.Array, rank: int) -> jax.Array:
    """Applies a function of images in one batch to images with any number of batch axes, or none.

    Args:
        run: from (batch, *size, features) to (batch, *out, features).
        inputs: array of shape (..., *size, features).
        rank: the number of axes of space.
    """
    lead = inputs.shape[: inputs.ndim - rank - 1]
    if len(lead) == 1:
        return run(inputs)
    y = run(inputs.reshape(-1, *inputs.shape[len(lead) :]))
    return y.reshape(*lead, *y.shape[1:])


def check_images(layer: Any, inputs: jax.Array, features: int) -> None:
    """Checks that a layer can take an array.

    Args:
        layer: a convolution layer.
        inputs: what it was called with.
        features: what it expects along the last axis.

    Raises:
        ValueError: too few axes, or another number of features.
    """
    rank = len(layer.kernel_size)
    if inputs.ndim < rank + 1:
        raise ValueError(
            f"inputs of shape {inputs.shape} have no room for {rank} axes of space and one of "
            f"features; kernel_size={layer.kernel_size} wants (*batch, "
            f"{', '.join(['space'] * rank)}, {features})"
        )
    if inputs.shape[-1] != features:
        raise ValueError(
            f"inputs of shape {inputs.shape} have {inputs.shape[-1]} features, the last axis; the "
            f"layer was made for in_features={features}"
        )
