"""The catalogue's entries of the fp8 family."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.low_bit.fp8.fp8_einsum import Fp8Einsum
from flax_customgrad.low_bit.fp8.fp8_linear import Fp8Linear
from flax_customgrad.low_bit.fp8.fp8_product import fp8_product
from flax_customgrad.registry.entry import Entry
from flax_customgrad.registry.examples import RANDOM_BIAS, made, normal

_KEEPS = "the codes of x, one byte an element; scales"
_GAIN = (
    "products in fp8, composed: the backward is that of the float product at the codes; delayed "
    "scaling that no optimizer has to know of"
)
_SOURCE = "arXiv:2209.05433"


def _rounded(a: jax.Array, dtype: Any, margin: int) -> jax.Array:
    """An array rounded to an 8-bit float by its own scale, with the derivative of the array."""
    scale = jnp.abs(a).max() * 2**margin / float(jnp.finfo(dtype).max)
    codes = (a / scale).astype(jnp.float32).astype(dtype)
    return a + lax.stop_gradient(codes.astype(a.dtype) * scale - a)


def _expected_gradients(
    f: Callable[[jax.Array, jax.Array], jax.Array],
    layer: Any,
    bias_axes: tuple[int, ...],
    x: jax.Array,
    g: jax.Array,
) -> tuple[nnx.State, jax.Array]:
    """The gradients of `f(kernel, x)` with operands in E4M3 and a cotangent in E5M2."""
    operands = [_rounded(a, jnp.float8_e4m3fn, layer.margin) for a in (layer.kernel[...], x)]
    dw, dx = jax.vjp(f, *operands)[1](_rounded(g, jnp.float8_e5m2, layer.margin))
    grads = {"kernel": dw}
    if layer.bias is not None:
        grads["bias"] = g.sum(bias_axes)
    return nnx.State(grads), dx


def _linear(layer: Any, x: jax.Array, g: jax.Array) -> tuple[nnx.State, jax.Array]:
    return _expected_gradients(lambda w, x: x @ w, layer, tuple(range(g.ndim - 1)), x, g)


def _einsum(layer: Any, x: jax.Array, g: jax.Array) -> tuple[nnx.State, jax.Array]:
    return _expected_gradients(lambda w, x: jnp.einsum(layer.einsum_str, x, w), layer, (0, 1), x, g)


# Current scaling: the gradient of delayed scaling depends on earlier steps, and changes its state.
ENTRIES = (
    Entry(
        "Fp8Linear",
        "fp8",
        Fp8Linear,
        None,
        "surrogate",
        keeps=_KEEPS,
        gain=_GAIN,
        source=_SOURCE,
        formula=_linear,
        examples={
            "two batch axes, bias, margin, current scaling": made(
                12,
                6,
                scaling="current",
                margin=1,
                **RANDOM_BIAS,
                inputs=(lambda: normal(8, 2, 12),),
            ),
        },
        operations={fp8_product: "two batch axes, bias, margin, current scaling"},
        workloads={
            "4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),)),
            "4096x1024 to 1024, current scaling": made(
                1024, 1024, scaling="current", inputs=(lambda: normal(4096, 1024),)
            ),
        },
    ),
    Entry(
        "Fp8Einsum",
        "fp8",
        Fp8Einsum,
        None,
        "surrogate",
        keeps=_KEEPS,
        gain=_GAIN,
        source=_SOURCE,
        formula=_einsum,
        examples={
            "heads, current scaling": made(
                "nta,ahb->nthb",
                (4, 2, 3),
                (2, 3),
                scaling="current",
                **RANDOM_BIAS,
                inputs=(lambda: normal(8, 3, 4),),
            ),
        },
        workloads={
            "64x64x1024 to 16 heads of 64": made(
                "nta,ahb->nthb",
                (1024, 16, 64),
                (16, 64),
                inputs=(lambda: normal(64, 64, 1024),),
            ),
        },
    ),
)
