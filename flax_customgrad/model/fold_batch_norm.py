"""`fold_batch_norm`: a batch normalization in eval mode, as part of the layer before it.

    y = (W x + b - mean) f + beta,   f = scale / sqrt(var + epsilon)
      = (W f) x + (b - mean) f + beta

`f` multiplies the output features of the kernel. Both are computed in float32 or wider and rounded
once, to the dtype of the parameter.

Source: arXiv:1712.05877
"""

from typing import Any, TypeVar

import jax
from flax import nnx

from flax_customgrad.layers.conv.conv import Conv
from flax_customgrad.layers.conv.conv_transpose import ConvTranspose
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.layers.stacked import stack_axes
from flax_customgrad.model.tree import layers, set_mode
from flax_customgrad.numerics.accumulation import accumulator

M = TypeVar("M")

_FOLDABLE = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
_CALLS = {cls.__call__ for cls in (*_FOLDABLE, Linear, Conv, ConvTranspose)}


def fold_batch_norm(model: M, norm: nnx.BatchNorm | None = None) -> M:
    """Folds batch normalizations in eval mode into the layers before them.

    Of a model it folds each `BatchNorm` that follows a `Linear`, `Conv` or `ConvTranspose` in an
    `nnx.Sequential`, where it takes the normalization out; others stay. Fold what is held in
    another way by hand: `self.conv = fold_batch_norm(self.conv, self.norm)`, and call the norm no
    more. Fold first, then quantize.

    Args:
        model: a Module, or a tree of Modules; or one layer, with `norm`. It is not changed.
        norm: the normalization of the layer's output.

    Returns:
        A copy of the model in eval mode, or of the layer, whose outputs are the same but for
        rounding, in the dtype of the layers. A layer without a bias has one.

    Raises:
        TypeError: the layer is of another class, or has a `__call__` of its own; or `norm` is no
            `nnx.BatchNorm`.
        ValueError: the normalization is of another axis than the last or of another number of
            features, or its layer is called in other places too; or there is none to fold.

    Example:
        >>> import jax.numpy as jnp, flax_customgrad as fcg
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(
        ...     nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)
        >>> len(fcg.fold_batch_norm(model).layers)
        2

    Source: arXiv:1712.05877
    """
    if norm is not None:
        folded = nnx.clone(model, graph=True)
        _fold(folded, norm)
        return folded
    copy = nnx.clone(model, graph=True)
    set_mode(copy, "eval")
    found = layers(copy)
    paths = {id(layer): held_at for held_at, layer in found}
    changed = False
    for _, sequence in found:
        if isinstance(sequence, nnx.Sequential):
            changed |= _fold_sequence(sequence, paths)
    if not changed:
        raise ValueError(
            "fold_batch_norm: no BatchNorm follows a Linear, Conv or ConvTranspose in an "
            "nnx.Sequential of the model: fold by hand, "
            "self.conv = flax_customgrad.fold_batch_norm(self.conv, self.norm)"
        )
    return copy


def _fold_sequence(sequence: nnx.Sequential, paths: dict[int, tuple[str, ...]]) -> bool:
    """Folds the normalizations of a sequence, in place; whether there are any."""
    kept: list[Any] = []
    for layer in sequence.layers:
        before = kept[-1] if kept else None
        if not (isinstance(layer, nnx.BatchNorm) and _is_foldable(before)):
            kept.append(layer)
            continue
        if len(paths[id(before)]) > 1:
            raise ValueError(
                f"fold_batch_norm: a {type(before).__name__} before a BatchNorm is held at "
                f"{' and '.join(paths[id(before)])}, where it may be called without the "
                "normalization: give each place a layer of its own"
            )
        _fold(before, layer)
    changed = len(kept) < len(sequence.layers)
    if changed:
        sequence.layers = nnx.List(kept)
    return changed


def _is_foldable(layer: Any) -> bool:
    return isinstance(layer, _FOLDABLE) and type(layer).__call__ in _CALLS


def _fold(layer: Any, norm: Any) -> None:
    """Folds a normalization into a layer, in place."""
    name = type(layer).__name__
    if not isinstance(norm, nnx.BatchNorm):
        raise TypeError(f"fold_batch_norm: norm is a {type(norm).__name__}, write an nnx.BatchNorm")
    if not _is_foldable(layer):
        raise TypeError(
            f"fold_batch_norm: a {name} is no Linear, Conv or ConvTranspose of flax.nnx or "
            "flax_customgrad: fold before you turn a layer into another one"
        )
    if norm.axis != -1:
        raise ValueError(
            f"fold_batch_norm: the BatchNorm normalizes axis={norm.axis}, and the features of a "
            f"{name} are on the last one, axis=-1"
        )
    n, axes = layer.out_features, len(stack_axes(layer))
    if norm.mean.shape[axes:] != (n,):
        raise ValueError(
            f"fold_batch_norm: the BatchNorm has statistics of shape {norm.mean.shape}, and a "
            f"{name} {n} output features"
        )
    kernel, dtype = layer.kernel[...], accumulator(layer.kernel, norm.var)
    f = jax.lax.rsqrt(norm.var[...].astype(dtype) + norm.epsilon)
    if norm.scale is not None:
        f *= norm.scale[...]
    bias = 0 if layer.bias is None or not layer.use_bias else layer.bias[...].astype(dtype)
    shift = (bias - norm.mean[...]) * f
    if norm.bias is not None:
        shift += norm.bias[...]
    # The axis of the output features, counted from the end.
    last = 2 if getattr(layer, "transpose_kernel", False) else 1
    inner = (1,) * (kernel.ndim - axes - last)
    by_output = f.reshape(*f.shape[:axes], *inner, n, *(1,) * (last - 1))
    layer.kernel = layer.kernel.replace((kernel * by_output).astype(kernel.dtype))
    shift = shift.astype(kernel.dtype if layer.bias is None else layer.bias.dtype)
    layer.bias = nnx.Param(shift) if layer.bias is None else layer.bias.replace(shift)
    layer.use_bias = True
