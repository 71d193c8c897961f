"""The catalogue's entries of the quantized layers.

Their formulas use `lax.stop_gradient`: JAX differentiates the layer of flax.nnx with operands
`a + (q - a)`, whose second term is a constant.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_customgrad.low_bit.quant_layers.binary_layers import BinaryConv, BinaryLinear
from flax_customgrad.low_bit.quant_layers.bit_linear import BitLinear
from flax_customgrad.low_bit.quant_layers.quant_conv import QuantConv
from flax_customgrad.low_bit.quant_layers.quant_conv_transpose import QuantConvTranspose
from flax_customgrad.low_bit.quant_layers.quant_einsum import QuantEinsum
from flax_customgrad.low_bit.quant_layers.quant_embed import QuantEmbed
from flax_customgrad.low_bit.quant_layers.quant_linear import QuantLinear
from flax_customgrad.low_bit.quant_layers.quant_linear_general import QuantLinearGeneral
from flax_customgrad.low_bit.quant_layers.quantized_product import quantized_product
from flax_customgrad.low_bit.quant_layers.ternary_layers import TernaryConv, TernaryLinear
from flax_customgrad.low_bit.quantizers.binary import BinaryActivation, BinaryWeight
from flax_customgrad.low_bit.quantizers.fake_quant import FakeQuant
from flax_customgrad.low_bit.quantizers.quantizer import Quantizer
from flax_customgrad.low_bit.quantizers.ternary_weights import TWN, AbsMean
from flax_customgrad.registry.entry import Entry, Example
from flax_customgrad.registry.examples import RANDOM_BIAS, made, normal, straight_through


def _pass_within_one(a: jax.Array) -> jax.Array:
    """`a`, with a gradient where `|a| <= 1`."""
    return jnp.where(jnp.abs(a) <= 1, a, lax.stop_gradient(a))


def _shared_axes(axis: Any, a: jax.Array) -> tuple[int, ...]:
    """The axes that share a range."""
    if axis == "token":
        return (a.ndim - 1,)
    return tuple(set(range(a.ndim)) - {i % a.ndim for i in axis or ()})


def _fake_quant(quantizer: Any, a: jax.Array) -> jax.Array:
    high = 2 ** (quantizer.bits - 1) - 1
    shared = _shared_axes(quantizer.granularity.axis, a)
    s = lax.stop_gradient(jnp.max(jnp.abs(a), shared, keepdims=True) / high)
    return straight_through(a, s * jnp.round(a / s))


def _scaled_sign(quantizer: Any, w: jax.Array) -> jax.Array:
    scale = jnp.mean(jnp.abs(w), _shared_axes(quantizer.granularity.axis, w), keepdims=True)
    return lax.stop_gradient(scale) * straight_through(
        _pass_within_one(w), jnp.where(w >= 0, 1, -1)
    )


def _sign(quantizer: Any, x: jax.Array) -> jax.Array:
    return straight_through(_pass_within_one(x), jnp.where(x >= 0, 1, -1).astype(x.dtype))


def _twn(quantizer: Any, w: jax.Array) -> jax.Array:
    large = jnp.abs(w) > quantizer.threshold * jnp.mean(jnp.abs(w))
    scale = jnp.sum(jnp.abs(w) * large) / jnp.sum(large)
    return straight_through(w, scale * large * jnp.sign(w))


def _abs_mean(quantizer: Any, w: jax.Array) -> jax.Array:
    scale = jnp.mean(jnp.abs(w))
    return straight_through(w, scale * jnp.clip(jnp.round(w / scale), -1, 1))


_FORMULAS: dict[type[Quantizer], Callable[..., jax.Array]] = {
    FakeQuant: _fake_quant,
    BinaryWeight: _scaled_sign,
    BinaryActivation: _sign,
    TWN: _twn,
    AbsMean: _abs_mean,
}


def _quantized(quantizer: Quantizer | None, a: jax.Array) -> jax.Array:
    """Quantizes an array with a formula, in float32 or wider, and rounds once to its dtype."""
    if quantizer is None:
        return a
    wide = a.astype(jnp.result_type(a, jnp.float32))
    return _FORMULAS[type(quantizer)](quantizer, wide).astype(a.dtype)


def _formula_of(
    method: Callable[..., jax.Array],
    kernel: str = "kernel",
    before: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Callable[..., tuple[Any, ...]]:
    """The formula of a layer: JAX's gradient of a method of flax.nnx with quantized operands.

    Args:
        method: the method of the layer of flax.nnx.
        kernel: the name of the layer's kernel.
        before: a function that is applied to the input first.
    """

    def formula(layer: Any, x: jax.Array, g: jax.Array) -> tuple[Any, ...]:
        graphdef, params, rest = nnx.split(layer, nnx.Param, ..., graph=True)
        is_integer = jnp.issubdtype(x.dtype, jnp.integer)

        def call(params: nnx.State, x: jax.Array) -> jax.Array:
            w: Any = params[kernel]
            mask = getattr(layer, "mask", None)
            kept = w[...] if mask is None else w[...] * mask
            quantized = w.replace(_quantized(layer.weight, kept))
            merged = nnx.merge(graphdef, nnx.State({**params, kernel: quantized}), rest)
            if mask is not None:
                merged.mask = mask != 0  # A second time it only leaves out what it left out.
            x = x if is_integer else _quantized(layer.activation, before(x))
            return method(merged, x)

        if is_integer:
            return *jax.vjp(lambda params: call(params, x), params)[1](g), None
        return jax.vjp(call, params, x)[1](g)

    return formula


def _standardized(x: jax.Array) -> jax.Array:
    """The input of a BitLinear divided by its root mean square."""
    wide = x.astype(jnp.result_type(x, jnp.float32))
    rms = jnp.sqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    return (wide / rms).astype(x.dtype)


def _few_bits(bits: int, *args: Any, channel_axis: Any = -1, **kwargs: Any) -> Example:
    """An example of a layer whose weights and inputs have few bits.

    Args:
        bits: how many bits.
        *args: positional arguments of the layer's constructor.
        channel_axis: the axes of the kernel along which each index has a range of its own.
        **kwargs: as for `made`.
    """

    def make(cls: Any) -> tuple[Any, ...]:
        quantizers = {"weight": FakeQuant(bits, axis=channel_axis), "activation": FakeQuant(bits)}
        return made(*args, **quantizers, **kwargs)(cls)

    return make


def _bit_linear(layer: Any, x: jax.Array, g: jax.Array) -> tuple[Any, ...]:
    """The gradient of a product with the input, divided by its root mean square or not."""
    before = _standardized if layer.norm is not None else lambda x: x
    return _formula_of(nnx.Linear.__call__, before=before)(layer, x, g)


def _attend(embed: nnx.Embed, query: jax.Array) -> jax.Array:
    return embed.attend(query)


def _embed(layer: Any, x: jax.Array, g: jax.Array) -> tuple[Any, ...]:
    """The gradient of a look-up, or of the products with a query."""
    is_query = jnp.issubdtype(x.dtype, jnp.floating)
    method = nnx.Embed.attend if is_query else nnx.Embed.__call__
    return _formula_of(method, "embedding")(layer, x, g)


_GAIN = "training in few bits, and few bits kept between the passes"
_COMPOSED = "composed: the backwards of {} and of the quantizers, at the decoded codes"
_KEEPS = "codes of x and kernel, their scales; "
_BINARY = "a sign and a bit of its mask for each element of x and kernel; "
_TERNARY = "x, codes of the kernel and their scale; "

# Leaves out every fifth weight of a kernel of 3, with 2 features in and 4 out.
_MASK = (np.arange(3 * 2 * 4) % 5 > 0).reshape(3, 2, 4).astype(np.float32)
_CONVOLUTIONS = {
    "padded": made(3, 4, 2, **RANDOM_BIAS, inputs=(lambda: normal(8, 4, 3),)),
    "strided, groups": made(
        4, 6, 3, strides=2, feature_group_count=2, inputs=(lambda: normal(8, 5, 4),)
    ),
    "both dilations, mask": made(
        2,
        4,
        3,
        kernel_dilation=2,
        input_dilation=3,
        padding=((1, 2),),
        mask=_MASK,
        inputs=(lambda: normal(8, 5, 2),),
    ),
}

ENTRIES = (
    Entry(
        "QuantLinear",
        "quant_layers",
        QuantLinear,
        None,
        "surrogate",
        keeps=_KEEPS + _COMPOSED.format("`linear`"),
        gain=_GAIN,
        source="arXiv:1308.3432",
        formula=_formula_of(nnx.Linear.__call__),
        examples={
            "3 bits, a batch axis of size 1, codes that leave a byte half full": _few_bits(
                3, 5, 4, **RANDOM_BIAS, inputs=(lambda: normal(8, 1, 5),)
            ),
            "2 bits, no bias, two batch axes": _few_bits(
                2, 6, 4, use_bias=False, inputs=(lambda: normal(8, 2, 6),)
            ),
        },
        operations={
            quantized_product: "3 bits, a batch axis of size 1, codes that leave a byte half full"
        },
        workloads={
            "W4A4, 4096x1024 to 1024": _few_bits(
                4, 1024, 1024, inputs=(lambda: normal(4096, 1024),)
            )
        },
    ),
    Entry(
        "QuantLinearGeneral",
        "quant_layers",
        QuantLinearGeneral,
        None,
        "surrogate",
        keeps=_KEEPS + _COMPOSED.format("`linear_general`"),
        gain=_GAIN,
        source="arXiv:1308.3432",
        formula=_formula_of(nnx.LinearGeneral.__call__),
        examples={
            "two axes": _few_bits(
                4,
                (2, 3),
                (4, 5),
                channel_axis=(-2, -1),
                axis=(1, -1),
                **RANDOM_BIAS,
                inputs=(lambda: normal(8, 2, 3),),
            ),
        },
        workloads={
            "W4A4, heads, 8x512x512 to 8x64": _few_bits(
                4, 512, (8, 64), inputs=(lambda: normal(8, 512, 512),)
            )
        },
    ),
    Entry(
        "QuantEinsum",
        "quant_layers",
        QuantEinsum,
        None,
        "surrogate",
        keeps=_KEEPS + _COMPOSED.format("`einsum`"),
        gain=_GAIN,
        source="arXiv:1308.3432",
        formula=_formula_of(nnx.Einsum.__call__),
        examples={
            "heads": _few_bits(
                3,
                "nta,hab->nthb",
                (3, 5, 2),
                (3, 2),
                **RANDOM_BIAS,
                inputs=(lambda: normal(8, 2, 5),),
            ),
        },
        workloads={
            "W4A4, heads, 8x512x512": _few_bits(
                4, "nta,hab->nthb", (8, 512, 64), inputs=(lambda: normal(8, 512, 512),)
            )
        },
    ),
    Entry(
        "QuantConv",
        "quant_layers",
        QuantConv,
        None,
        "surrogate",
        keeps=_KEEPS + _COMPOSED.format("`convolution`"),
        gain="training in few bits, of grouped and depthwise kernels too, and few bits kept",
        source="arXiv:1308.3432",
        formula=_formula_of(nnx.Conv.__call__),
        examples={
            "8 bits, both dilations, mask": _few_bits(
                8,
                2,
                4,
                3,
                kernel_dilation=2,
                input_dilation=3,
                padding=((1, 2),),
                mask=_MASK,
                **RANDOM_BIAS,
                inputs=(lambda: normal(8, 5, 2),),
            ),
            "8 bits, images": _few_bits(8, 2, 2, (2, 2), inputs=(lambda: normal(8, 3, 2, 2),)),
            "4 bits, grouped, strided, circular": _few_bits(
                4,
                4,
                6,
                2,
                2,
                padding="CIRCULAR",
                feature_group_count=2,
                use_bias=False,
                inputs=(lambda: normal(8, 5, 4),),
            ),
        },
        workloads={
            "W4A4, 3x3, 16x32x32x128": _few_bits(
                4, 128, 128, (3, 3), inputs=(lambda: normal(16, 32, 32, 128),)
            )
        },
    ),
    Entry(
        "QuantConvTranspose",
        "quant_layers",
        QuantConvTranspose,
        None,
        "surrogate",
        keeps=_KEEPS + _COMPOSED.format("`convolution`"),
        gain=_GAIN,
        source="arXiv:1308.3432",
        formula=_formula_of(nnx.ConvTranspose.__call__),
        examples={
            "strided, mask": _few_bits(
                8,
                2,
                4,
                3,
                strides=2,
                mask=_MASK,
                **RANDOM_BIAS,
                inputs=(lambda: normal(8, 3, 2),),
            ),
        },
        workloads={
            "W4A4, 4x4, 16x16x16x128": _few_bits(
                4, 128, 128, (4, 4), strides=2, inputs=(lambda: normal(16, 16, 16, 128),)
            )
        },
    ),
    Entry(
        "QuantEmbed",
        "quant_layers",
        QuantEmbed,
        None,
        "surrogate",
        keeps="ids; attend: codes of query and table, their scales; "
        + _COMPOSED.format("`lookup` and `attend`"),
        gain=_GAIN,
        source="arXiv:1308.3432",
        formula=_embed,
        examples={
            "lookup": _few_bits(
                4, 5, 3, channel_axis=0, inputs=(lambda: jnp.array([0, 4, 1, -1, 1, 2, 0, 1]),)
            ),
            "attend": _few_bits(
                4, 5, 3, channel_axis=0, inputs=(lambda: normal(8, 3),), call=_attend
            ),
        },
        workloads={
            "4 bits, attend, 4096x512 to 8192": _few_bits(
                4, 8192, 512, channel_axis=0, inputs=(lambda: normal(4096, 512),), call=_attend
            )
        },
    ),
    Entry(
        "BinaryLinear",
        "quant_layers",
        BinaryLinear,
        None,
        "surrogate",
        keeps=_BINARY + _COMPOSED.format("`linear`"),
        gain="weights and inputs of one bit, kept in one bit",
        source="arXiv:1603.05279",
        formula=_formula_of(nnx.Linear.__call__),
        examples={"bias": made(6, 4, **RANDOM_BIAS, inputs=(lambda: normal(8, 6),))},
        workloads={"4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),))},
    ),
    Entry(
        "BinaryConv",
        "quant_layers",
        BinaryConv,
        None,
        "surrogate",
        keeps=_BINARY + _COMPOSED.format("`convolution`"),
        gain="weights and inputs of one bit, kept in one bit",
        source="arXiv:1603.05279",
        formula=_formula_of(nnx.Conv.__call__),
        examples=_CONVOLUTIONS,
        workloads={
            "3x3, 16x32x32x128": made(128, 128, (3, 3), inputs=(lambda: normal(16, 32, 32, 128),))
        },
    ),
    Entry(
        "TernaryLinear",
        "quant_layers",
        TernaryLinear,
        None,
        "surrogate",
        keeps=_TERNARY + _COMPOSED.format("`linear`"),
        gain="weights of -1, 0 and 1, kept in two bits",
        source="arXiv:1605.04711",
        formula=_formula_of(nnx.Linear.__call__),
        examples={"bias": made(6, 4, **RANDOM_BIAS, inputs=(lambda: normal(8, 6),))},
        workloads={"4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),))},
    ),
    Entry(
        "TernaryConv",
        "quant_layers",
        TernaryConv,
        None,
        "surrogate",
        keeps=_TERNARY + _COMPOSED.format("`convolution`"),
        gain="weights of -1, 0 and 1, kept in two bits",
        source="arXiv:1605.04711",
        formula=_formula_of(nnx.Conv.__call__),
        examples=_CONVOLUTIONS,
        workloads={
            "3x3, 16x32x32x128": made(128, 128, (3, 3), inputs=(lambda: normal(16, 32, 32, 128),))
        },
    ),
    Entry(
        "BitLinear",
        "quant_layers",
        BitLinear,
        None,
        "surrogate",
        keeps="x, its rms, codes of both operands, their scales; "
        + _COMPOSED.format("RMSNorm, `linear`"),
        gain="ternary weights and 8-bit inputs, with the norm of BitNet",
        source="arXiv:2402.17764",
        formula=_bit_linear,
        examples={
            "with its norm": made(6, 4, use_bias=False, inputs=(lambda: normal(8, 6),)),
            "bias, no norm": made(
                6, 4, norm=False, **RANDOM_BIAS, inputs=(lambda: normal(8, 2, 6),)
            ),
        },
        workloads={"4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),))},
    ),
)
