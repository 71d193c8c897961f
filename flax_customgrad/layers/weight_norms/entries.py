"""The catalogue's entries of the wrappers that normalize a layer's weights."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.layers.weight_norms.spectral_norm import SpectralNorm, spectral_norm
from flax_customgrad.layers.weight_norms.weight_norm import WeightNorm, weight_norm
from flax_customgrad.layers.weight_norms.weight_standardization import WeightStandardization
from flax_customgrad.registry.entry import Entry, Example
from flax_customgrad.registry.examples import RANDOM_BIAS, normal, on_a_copy


def _wrapped(
    layer: Callable[[nnx.Rngs], nnx.Module],
    inputs: Callable[[], jax.Array],
    call: Any = None,
    **kwargs: Any,
) -> Example:
    """An example whose wrapper is built as `cls(layer, **kwargs, rngs=...)`."""

    def make(cls: Any) -> tuple[Any, ...]:
        made = cls(layer(nnx.Rngs(1)), **kwargs, rngs=nnx.Rngs(0))
        return (made, inputs()) if call is None else (call, made, inputs())

    return make


def _with_sigma(layer: Any, x: jax.Array) -> jax.Array:
    """Calls a copy of a layer, and adds the square of the singular value."""
    layer = nnx.clone(layer)
    return layer(x) + layer.batch_stats["kernel", "sigma"][...] ** 2


def _from_half_to_two(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Initializes scales to different values; nnx 0.12.8 passes no key to draw them with."""
    return jnp.linspace(0.5, 2, math.prod(shape), dtype=dtype).reshape(shape)


def _linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(6, 4, **RANDOM_BIAS, rngs=rngs)


def _dominant_direction(rngs: nnx.Rngs) -> nnx.LinearGeneral:
    """Its kernel has one large singular value, to which two steps of power iteration converge."""
    layer = nnx.LinearGeneral((2, 1, 3), 4, axis=(1, 2, 3), **RANDOM_BIAS, rngs=rngs)
    layer.kernel[...] = 0.02 * layer.kernel[...] + normal(2, 1, 3, 1) * normal(4)
    return layer


def _heads(rngs: nnx.Rngs) -> nnx.LinearGeneral:
    return nnx.LinearGeneral(6, (3, 4), **RANDOM_BIAS, rngs=rngs)


def _of_four_axes(rngs: nnx.Rngs) -> nnx.LinearGeneral:
    return nnx.LinearGeneral((2, 3), (1, 4), axis=(1, 2), **RANDOM_BIAS, rngs=rngs)


def _two_layers(rngs: nnx.Rngs) -> nnx.Sequential:
    return nnx.Sequential(_linear(rngs), nnx.Linear(4, 2, **RANDOM_BIAS, rngs=rngs))


def _large_linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(1024, 1024, rngs=rngs)


def _large_conv(rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(128, 128, kernel_size=(3, 3), rngs=rngs)


_CONSTANT = nnx.initializers.constant(1.5)
_WORKLOADS = {
    "Linear, 4096x1024 to 1024": (_large_linear, lambda: normal(4096, 1024)),
    "Conv 3x3, 8x32x32x128 to 128": (_large_conv, lambda: normal(8, 32, 32, 128)),
}

ENTRIES = (
    Entry(
        "WeightNorm",
        "weight_norms",
        WeightNorm,
        nnx.WeightNorm,
        "exact",
        keeps="kernel, scale, one norm per feature",
        gain="trains its scales; right for tiny and huge kernels and in half precision",
        source="arXiv:1602.07868",
        examples={
            "scale, two feature axes apart, an axis of size 1": _wrapped(
                _of_four_axes,
                lambda: normal(8, 2, 3),
                on_a_copy,
                feature_axes=(0, -1),
                scale_init=_from_half_to_two,
            ),
            "whole kernels of two layers": _wrapped(
                _two_layers,
                # For smaller ones the gradient of a scale nearly cancels, too much for bfloat16.
                lambda: 2 * normal(8, 6),
                on_a_copy,
                feature_axes=None,
                scale_init=_CONSTANT,
            ),
            "no scale, two feature axes": _wrapped(
                _heads, lambda: normal(8, 6), on_a_copy, feature_axes=(1, -1), use_scale=False
            ),
        },
        workloads={name: _wrapped(*made) for name, made in _WORKLOADS.items()},
        operations={weight_norm: "scale, two feature axes apart, an axis of size 1"},
    ),
    Entry(
        "SpectralNorm",
        "weight_norms",
        SpectralNorm,
        nnx.SpectralNorm,
        "exact",
        keeps="kernel, its singular vectors and value",
        gain="keeps the kernel alone; right for tiny and huge kernels and in half precision",
        source="arXiv:1802.05957",
        examples={
            "a kernel of four axes, one of size 1, and sigma": _wrapped(
                _dominant_direction, lambda: normal(8, 2, 1, 3), _with_sigma, n_steps=2
            ),
        },
        workloads={name: _wrapped(*made) for name, made in _WORKLOADS.items()},
        operations={spectral_norm: "a kernel of four axes, one of size 1, and sigma"},
    ),
    Entry(
        "WeightStandardization",
        "weight_norms",
        WeightStandardization,
        None,
        "exact",
        keeps="kernel, scale, three numbers per feature",
        gain="right for kernels with a large mean",
        source="arXiv:1903.10520",
        examples={
            "two feature axes": _wrapped(_heads, lambda: normal(8, 6), feature_axes=(1, 2)),
            "scale": _wrapped(
                _linear, lambda: normal(8, 6), use_scale=True, scale_init=_from_half_to_two
            ),
        },
        workloads={name: _wrapped(*made) for name, made in _WORKLOADS.items()},
    ),
)
