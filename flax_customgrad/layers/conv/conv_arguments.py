"""The arguments of convolution layers: one number per axis, padding, masks, and their errors."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax

from flax_customgrad.layers.conv.geometry import BoundaryPadding, dilated_size
from flax_customgrad.layers.drop_in import Parameters, has_own_bias, parameters
from flax_customgrad.numerics.argument_checks import integers, is_integer

PaddingPairs = tuple[tuple[int, int], ...]
"""(low, high) for each axis of space."""

_BOUNDARY_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def per_axis(name: str, value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """An argument of a layer as one number for each axis of space.

    Args:
        name: its name, for the error.
        value: int, a sequence, or None for 1.
        rank: the number of axes.

    Raises:
        ValueError: the sequence is of another length, or a number is below 1.
    """
    numbers = (1,) if value is None else integers(value)
    if value is None or is_integer(value):
        numbers *= rank
    if len(numbers) != rank or any(n < 1 for n in numbers):
        raise ValueError(
            f"{name}={value!r}; write an int of at least 1, or {rank} of them, one for each axis "
            "of kernel_size"
        )
    return numbers


def has_own_kernel(layer: Any, params: Parameters) -> bool:
    """Whether the kernel has the shape that the layer says it has.

    Args:
        layer: a convolution layer.
        params: its parameters.
    """
    kernel, size = params["kernel"].shape, tuple(layer.kernel_size)
    return kernel == layer.kernel_shape and kernel[:-2] == size


def parameters_with_mask_applied(layer: nnx.Conv | nnx.ConvTranspose) -> Parameters:
    """The parameters of a layer, its kernel times its mask.

    Args:
        layer: a convolution layer.

    Raises:
        ValueError: the mask has another shape than the kernel, or the kernel has been replaced by
            one of another shape than the layer says.
    """
    params = parameters(layer, "kernel", "bias")
    if not has_own_kernel(layer, params):
        raise ValueError(
            f"{type(layer).__name__}: the kernel has shape {params['kernel'].shape}, but "
            f"kernel_size={layer.kernel_size} and kernel_shape={layer.kernel_shape}: set them, "
            "in_features and out_features when you replace a kernel"
        )
    if layer.mask is None:
        return params
    if layer.mask.shape != layer.kernel_shape:
        raise ValueError(
            f"Mask needs to have the same shape as weights. Shapes are: {layer.mask.shape}, "
            f"{layer.kernel_shape}"
        )
    return nnx.State({**params, "kernel": params["kernel"] * layer.mask})


def has_own_shapes(layer: Any, params: Parameters) -> bool:
    """Whether kernel and bias have the shapes that the layer says they have; else nnx computes.

    Args:
        layer: a convolution layer.
        params: its parameters.
    """
    groups = getattr(layer, "feature_group_count", 1)
    features = (layer.in_features // groups, layer.out_features)
    if getattr(layer, "transpose_kernel", False):
        features = features[::-1]
    return (
        has_own_kernel(layer, params)
        and params["kernel"].shape[-2:] == features
        and has_own_bias(layer, params, (layer.out_features,))
    )


def check_conv_inputs(layer: Any, inputs: jax.Array, features: int) -> None:
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


def resolve_padding(
    padding: Any,
    size: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    input_dilation: Sequence[int],
) -> tuple[PaddingPairs, BoundaryPadding | None]:
    """The zeros around an image, or what there is instead of them.

    Args:
        padding: int, pairs, or a name, as `flax.nnx.Conv` takes it.
        size: extent of the image.
        window: extent of the kernel.
        strides: steps between windows.
        dilation: steps between the elements of the window.
        input_dilation: steps between the elements of the image.

    Raises:
        ValueError: the padding is none of those, CAUSAL for more than one axis, or SAME for an
            image that is dilated.
    """
    reach = list(map(dilated_size, window, dilation))
    name = padding.upper() if isinstance(padding, str) else None
    if name in _BOUNDARY_MODES:
        pairs = tuple(((k - 1) // 2, k // 2) for k in reach)
        return ((0, 0),) * len(pairs), BoundaryPadding(_BOUNDARY_MODES[name], pairs)
    if name == "CAUSAL":
        if len(reach) != 1:
            raise ValueError(
                f"padding='CAUSAL' is for one axis of space, and the kernel has {len(reach)}; "
                "write (low, high) pairs, such as [(2, 0), (1, 1)]"
            )
        return ((reach[0] - 1, 0),), None
    names = "'SAME', 'VALID', 'CIRCULAR', 'REFLECT' or 'CAUSAL'"
    if name == "VALID":
        return ((0, 0),) * len(reach), None
    if name in ("SAME", "SAME_LOWER"):
        if any(d > 1 for d in input_dilation):
            raise ValueError(
                f"padding={name!r} is for an input that is not dilated, and input_dilation="
                f"{tuple(input_dilation)}; write (low, high) pairs, one for each axis"
            )
        return tuple(lax.padtype_to_pads(size, reach, strides, name)), None
    return padding_pairs(padding, len(reach), names), None


def padding_pairs(padding: Any, rank: int, names: str) -> PaddingPairs:
    """Padding in numbers.

    Args:
        padding: int, or one int or (low, high) tuple for each axis.
        rank: the number of axes.
        names: the names that could have been written instead, for the error.

    Raises:
        ValueError: it is none of those.
    """
    if not isinstance(padding, str):
        with contextlib.suppress(TypeError):
            each = [padding] * rank if is_integer(padding) else list(padding)
            pairs = [integers(p) * 2 if is_integer(p) else integers(p) for p in each]
            if len(pairs) == rank and all(len(pair) == 2 for pair in pairs):
                return tuple(pairs)  # type: ignore[return-value]
    raise ValueError(
        f"padding={padding!r}; write {names}, an int, or {rank} ints or (low, high) tuples, one "
        "for each axis of kernel_size"
    )
