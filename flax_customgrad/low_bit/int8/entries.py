"""The catalogue's entries of the int8 family."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_customgrad.low_bit.int8.int8_conv import Int8Conv
from flax_customgrad.low_bit.int8.int8_linear import Int8Linear
from flax_customgrad.low_bit.int8.int8_product import int8_product
from flax_customgrad.registry.entry import Entry
from flax_customgrad.registry.examples import RANDOM_BIAS, made, normal, straight_through

_GAIN = (
    "{} in int8, forward and on request backward, which is otherwise composed of float ones; a "
    "quarter of the input is kept"
)


def _scale(a: jax.Array, axes: Any) -> jax.Array:
    """The scale that maps the largest element to 127; for zeros the smallest normal number."""
    largest = lax.stop_gradient(jnp.abs(a).max(axes, keepdims=True))
    return jnp.maximum(largest / 127, jnp.finfo(a.dtype).tiny)


def _rounded_to(a: jax.Array, scale: jax.Array) -> jax.Array:
    """An array rounded to multiples of a scale, with the derivative of the array."""
    return straight_through(a, jnp.round(a / scale) * scale)


def _with_a_row_of_zeros() -> jax.Array:
    return normal(8, 2, 12).at[3, 1].set(0)


def _expected_gradients(
    f: Callable[[jax.Array, jax.Array], jax.Array],
    layer: Any,
    x: jax.Array,
    row: Any,
    g: jax.Array,
) -> tuple[nnx.State, jax.Array]:
    """The gradients of `f(kernel, x)` with rounded operands, and in int8 a rounded cotangent."""
    w, mask = layer.kernel[...], getattr(layer, "mask", None)
    if mask is not None:
        w = w * mask
    channels = tuple(range(w.ndim - 1)), tuple(range(g.ndim - 1))
    s_w, s_x = _scale(w, channels[0]), _scale(x, row)
    w_hat, x_hat = _rounded_to(w, s_w), _rounded_to(x, s_x)
    if layer.rounding.backward == "float":
        dw, dx = jax.vjp(f, w_hat, x_hat)[1](g)
    else:
        u, v = g * s_w.reshape(-1), g * s_x
        u, v = _rounded_to(u, _scale(u, row)), _rounded_to(v, _scale(v, channels[1]))
        dx = jax.vjp(f, w_hat / s_w, x)[1](u)[1]
        dw = jax.vjp(f, w, x_hat / s_x)[1](v)[0]
    grads = {"kernel": dw if mask is None else dw * mask}
    if layer.bias is not None:
        grads["bias"] = g.sum(channels[1])
    return nnx.State(grads), dx


def _linear(layer: Any, x: jax.Array, g: jax.Array) -> tuple[nnx.State, jax.Array]:
    return _expected_gradients(lambda w, x: x @ w, layer, x, -1, g)


def _conv(layer: Any, x: jax.Array, g: jax.Array) -> tuple[nnx.State, jax.Array]:
    def f(w: jax.Array, x: jax.Array) -> jax.Array:
        numbers = ("NWC", "WIO", "NWC") if w.ndim == 3 else ("NHWC", "HWIO", "NHWC")
        strides = (layer.strides,) * (w.ndim - 2)
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            layer.padding,
            (layer.input_dilation,) * (w.ndim - 2),
            (layer.kernel_dilation,) * (w.ndim - 2),
            dimension_numbers=numbers,
            feature_group_count=layer.feature_group_count,
        )

    return _expected_gradients(f, layer, x, tuple(range(1, x.ndim)), g)


# Leaves out every fifth weight of a kernel of 3, with 2 features in and 4 out.
_MASK = (np.arange(3 * 2 * 4) % 5 > 0).reshape(3, 2, 4).astype(np.float32)

ENTRIES = (
    Entry(
        "Int8Linear",
        "int8",
        Int8Linear,
        None,
        "surrogate",
        keeps="int8 codes of x and their scales",
        gain=_GAIN.format("products"),
        source="arXiv:2105.03536",
        formula=_linear,
        examples={
            "float backward": made(12, 6, **RANDOM_BIAS, inputs=(lambda: normal(8, 12),)),
            "int8 backward, two batch axes, bias, a row of zeros": made(
                12, 5, backward="int8", **RANDOM_BIAS, inputs=(_with_a_row_of_zeros,)
            ),
        },
        operations={int8_product: "int8 backward, two batch axes, bias, a row of zeros"},
        workloads={"4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),))},
    ),
    Entry(
        "Int8Conv",
        "int8",
        Int8Conv,
        None,
        "surrogate",
        keeps="int8 codes of x and their scales",
        gain=_GAIN.format("convolutions"),
        source="arXiv:2105.03536",
        formula=_conv,
        examples={
            "float backward, strides": made(
                4, 2, (3,), strides=2, **RANDOM_BIAS, inputs=(lambda: normal(8, 7, 4),)
            ),
            "int8 backward, groups": made(
                4,
                6,
                (2, 2),
                strides=1,
                feature_group_count=2,
                backward="int8",
                inputs=(lambda: normal(8, 3, 4, 4),),
            ),
            "float backward, both dilations, mask": made(
                2,
                4,
                (3,),
                kernel_dilation=2,
                input_dilation=3,
                padding=((1, 2),),
                mask=_MASK,
                inputs=(lambda: normal(8, 5, 2),),
            ),
        },
        workloads={
            "16x28x28x64 3x3 to 64": made(64, 64, (3, 3), inputs=(lambda: normal(16, 28, 28, 64),))
        },
    ),
)
