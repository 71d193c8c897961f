"""The catalogue's entries of the microscaling family."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.low_bit.microscaling.mx_linear import MXLinear
from flax_customgrad.low_bit.microscaling.nvfp4_linear import NVFP4Linear
from flax_customgrad.low_bit.microscaling.scaled_linear import scaled_linear
from flax_customgrad.registry.entry import Entry
from flax_customgrad.registry.examples import RANDOM_BIAS, made, normal, straight_through

_ELEMENTS = {
    "mxfp8": jnp.float8_e4m3fn,
    "mxfp4": jnp.float4_e2m1fn,
    "e4m3": jnp.float8_e4m3fn,
    "e5m2": jnp.float8_e5m2,
    "e2m1": jnp.float4_e2m1fn,
}
_SCALES = np.exp2(np.arange(-127.0, 120.0))

BlockQuantizer = Callable[[jax.Array, Sequence[int]], jax.Array]


def _with_a_row_of_zeros(n: int) -> jax.Array:
    return normal(8, 3, n).at[2, 1].set(0)


def _largest(x: jax.Array, axes: Sequence[int], size: int) -> jax.Array:
    """For each element the largest magnitude of its block."""
    largest = jnp.abs(x)
    for axis in axes:
        n = x.shape[axis]
        rows = jnp.moveaxis(largest, axis, 0)
        rows = jnp.pad(rows, [(0, -n % size)] + [(0, 0)] * (x.ndim - 1))
        blocks = rows.reshape(-1, size, *rows.shape[1:]).max(1)
        largest = jnp.moveaxis(jnp.repeat(blocks, size, 0)[:n], 0, axis)
    return largest


def _cast(x: jax.Array, element: Any) -> jax.Array:
    """The nearest element; a larger value saturates."""
    most = float(jnp.finfo(element).max)
    return jnp.clip(x, -most, most).astype(element).astype(x.dtype)


def _mx(element: Any, size: int, up: bool) -> BlockQuantizer:
    """Quantizes with the smallest scale that holds a block, or with the scale before."""
    most = float(jnp.finfo(element).max)

    def quantize(x: jax.Array, axes: Sequence[int]) -> jax.Array:
        a = _largest(x, axes, size)[..., None]
        if up:
            which = jnp.sum(_SCALES * most < a, -1)
        else:
            which = jnp.sum(_SCALES * 2.0 ** np.floor(np.log2(most)) <= a, -1) - 1
        scale = jnp.asarray(_SCALES, x.dtype)[which]
        return straight_through(x, _cast(x / scale, element) * scale)

    return quantize


def _nvfp4(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    a = jnp.max(jnp.abs(x))
    scale = jnp.maximum(_cast(448 * _largest(x, axes, 16) / a, jnp.float8_e4m3fn), 2.0**-9)
    elements = _cast(x * (448 * 6) / (a * scale), jnp.float4_e2m1fn)
    return straight_through(x, elements * scale * a / (448 * 6))


def _rotated(x: jax.Array) -> jax.Array:
    common = np.array([[(i & j).bit_count() for j in range(16)] for i in range(16)])
    h = jnp.asarray((-1.0) ** common * [int(f"{sign}1") for sign in "+++-+------+-+--"] / 4)
    rows = jnp.pad(x, [(0, -len(x) % 16), (0, 0)])
    return (h @ rows.reshape(-1, 16, x.shape[-1])).reshape(rows.shape)


def _linear(
    layer: Any,
    x: jax.Array,
    g: jax.Array,
    forward: BlockQuantizer,
    backward: BlockQuantizer,
    square: bool = False,
    rotate: bool = False,
) -> tuple[nnx.State, jax.Array]:
    w, rotated = layer.kernel[...], _rotated if rotate else lambda rows: rows
    rows, g_rows = (rotated(a.reshape(-1, a.shape[-1])) for a in (x, g))
    grads = {"kernel": forward(rows, (0,)).T @ backward(g_rows, (0,))}
    if layer.bias is not None:
        grads["bias"] = jnp.einsum("...o->o", g)
    wq = forward(w, (0, 1) if square else (1,))
    return nnx.State(grads), jnp.einsum("...o,io->...i", backward(g, (g.ndim - 1,)), wq)


def _mx_linear(layer: Any, x: jax.Array, g: jax.Array) -> tuple[nnx.State, jax.Array]:
    forward, backward = (
        _mx(_ELEMENTS[name], layer.block, layer.scale == "up")
        for name in (layer.format, layer.gradient)
    )
    return _linear(layer, x, g, forward, backward)


def _nvfp4_linear(layer: Any, x: jax.Array, g: jax.Array) -> tuple[nnx.State, jax.Array]:
    return _linear(layer, x, g, _nvfp4, _nvfp4, square=True, rotate=layer.hadamard)


ENTRIES = (
    Entry(
        "MXLinear",
        "microscaling",
        MXLinear,
        None,
        "surrogate",
        keeps="8-bit or packed 4-bit codes of x, kernel",
        gain="MXFP8 or MXFP4 products, forward and backward; an eighth of x kept",
        source="arXiv:2310.10537",
        formula=_mx_linear,
        examples={
            "block remainder, two batch axes, bias, a row of zeros": made(
                10, 6, block=4, inputs=(lambda: _with_a_row_of_zeros(10),)
            ),
            "MXFP4, two batch axes": made(
                33,
                6,
                format="mxfp4",
                gradient="e5m2",
                scale="down",
                use_bias=False,
                residuals="original",
                inputs=(lambda: normal(8, 5, 33),),
            ),
        },
        workloads={"4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),))},
    ),
    Entry(
        "NVFP4Linear",
        "microscaling",
        NVFP4Linear,
        None,
        "surrogate",
        keeps="packed 4-bit codes of x, kernel",
        gain="NVFP4 products, forward and backward; a seventh of x kept",
        source="arXiv:2509.25149",
        formula=_nvfp4_linear,
        examples={
            "block remainder, rotation, two batch axes, bias, a row of zeros": made(
                20,
                6,
                stochastic_rounding=False,
                **RANDOM_BIAS,
                inputs=(lambda: _with_a_row_of_zeros(20),),
            ),
            "no rotation, two batch axes": made(
                16,
                18,
                stochastic_rounding=False,
                hadamard=False,
                use_bias=False,
                inputs=(lambda: normal(8, 3, 16),),
            ),
        },
        operations={
            scaled_linear: "block remainder, rotation, two batch axes, bias, a row of zeros"
        },
        workloads={"4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),))},
    ),
)
