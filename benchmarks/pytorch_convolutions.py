"""Convolutions in PyTorch, in both of its layouts, where it is installed."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flax_customgrad import Conv, ConvTranspose
from flax_customgrad.layers.conv.geometry import dilated_size

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    torch = F = None  # type: ignore[assignment]


def steps(layer: Conv | ConvTranspose, images: jax.Array) -> dict[str, Callable[[], Any]]:
    """Functions that compute value and gradient once, eagerly, by layout; none without PyTorch.

    Args:
        layer: a layer of ours.
        images: array of shape (batch, *size, features), float32.
    """
    if torch is None or images.dtype != np.float32 or images.ndim > 5:
        return {}
    torch.set_num_threads(2)
    layouts = {"torch": torch.contiguous_format}
    if images.ndim == 4:
        layouts["channels last"] = torch.channels_last
    return {name: _step(layer, images, layout) for name, layout in layouts.items()}


def _step(layer: Conv | ConvTranspose, images: jax.Array, layout: Any) -> Callable[[], Any]:
    geometry = (
        layer._config(images) if isinstance(layer, ConvTranspose) else layer._config(images, None)
    )
    geometry = geometry.geometry
    rank, transposed = geometry.rank, isinstance(layer, ConvTranspose)
    x = torch.from_numpy(np.moveaxis(np.array(images), -1, 1).copy())
    kernel = np.array(layer.kernel[...])
    if transposed:  # (in, out, *window), of the map in the other direction
        kernel = np.moveaxis(np.flip(kernel, tuple(range(rank))), (-2, -1), (0, 1))
    else:  # (out, in, *window)
        kernel = np.moveaxis(kernel, (-1, -2), (0, 1))
    w = torch.from_numpy(kernel.copy())
    b = torch.from_numpy(np.array(layer.bias[...]).copy())
    if rank == 2:
        x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
    leaves = [x.requires_grad_(), w.requires_grad_(), b.requires_grad_()]
    convolve = getattr(F, f"conv_transpose{rank}d" if transposed else f"conv{rank}d")
    lows = [low for low, _ in geometry.padding]
    if transposed:
        reach = list(map(dilated_size, geometry.window, geometry.kernel_dilation))
        padding = [k - 1 - low for k, low in zip(reach, lows, strict=True)]
        extra = [
            o - ((n - 1) * s - 2 * p + k)
            for o, n, s, p, k in zip(
                geometry.out, geometry.size, geometry.input_dilation, padding, reach, strict=True
            )
        ]

        within = (..., *(slice(o) for o in geometry.out))  # PyTorch adds, and cuts nothing off

        def compute() -> Any:
            longer = [max(0, n) for n in extra]
            return convolve(x, w, b, geometry.input_dilation, padding, longer)[within]

    else:
        even = all(low == high for low, high in geometry.padding)
        around = [n for pair in reversed(geometry.padding) for n in pair]

        def compute() -> Any:
            padded, padding = (x, lows) if even else (F.pad(x, around), 0)
            return convolve(
                padded, w, b, geometry.strides, padding, geometry.kernel_dilation, geometry.groups
            )

    g = torch.randn_like(compute())

    def run() -> Any:
        for leaf in leaves:
            leaf.grad = None
        compute().backward(g)
        return x.grad

    return run
