"""The catalogue's entries of the quantizers.

Their formulas use `lax.stop_gradient`: JAX differentiates a quantizer without its rounding, and the
rounding error is added as a constant.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_customgrad.low_bit.quantizers.binary import BinaryActivation, BinaryWeight
from flax_customgrad.low_bit.quantizers.dorefa import DoReFaActivation, DoReFaWeight
from flax_customgrad.low_bit.quantizers.ewgs import EWGS
from flax_customgrad.low_bit.quantizers.fake_quant import FakeQuant
from flax_customgrad.low_bit.quantizers.gradient_quant import (
    DoReFaGradient,
    GradientQuant,
    quantize_gradient,
)
from flax_customgrad.low_bit.quantizers.lsq import LSQ
from flax_customgrad.low_bit.quantizers.lsq_plus import LSQPlus
from flax_customgrad.low_bit.quantizers.pact import PACT
from flax_customgrad.low_bit.quantizers.ternary_weights import TWN, AbsMean
from flax_customgrad.low_bit.quantizers.tqt import TQT
from flax_customgrad.low_bit.quantizers.ttq import TTQ
from flax_customgrad.numerics.elementwise import elementwise_surrogate
from flax_customgrad.registry.entry import Curve, Entry, Example
from flax_customgrad.registry.examples import made, normal, on_a_copy, straight_through

Params = Mapping[str, jax.Array]


def _few() -> jax.Array:
    return normal(8, 6)


def _many() -> jax.Array:
    return normal(4096, 1024)


def _on_few(*args: Any, call: Any = None, observed: float = 0, **kwargs: Any) -> Example:
    """An example of a quantizer on a few inputs, which it has observed, times a number, or not."""

    def make(cls: Any) -> tuple[Any, ...]:
        layer, x = cls(*args, **kwargs), _few()
        if observed:
            layer.observe(observed * x)
        return (layer, x) if call is None else (call, layer, x)

    return make


def _on_the_grid(*args: Any, **kwargs: Any) -> Example:
    """An example of a quantizer in steps of 1/4, with inputs at ties and at both bounds."""

    def make(cls: Any) -> tuple[Any, ...]:
        layer, x = cls(*args, **kwargs), jnp.round(6 * normal(8, 1, 11)) / 8
        if isinstance(layer, LSQPlus):
            layer.scale = nnx.Param(jnp.full((1, 1, 11), 0.25).at[..., 0].set(0.5))
            layer.offset = nnx.Param(jnp.full((1, 1, 11), 0.125).at[..., 1].set(0))
        return layer, x

    return make


# Each quantizer without its rounding: a function of the quantizer, its parameters, x and, where the
# gradient depends on it, g.

_constant = lax.stop_gradient


def _clip_inclusive(x: jax.Array, low: Any, high: Any) -> jax.Array:
    """Clips, with the gradient of x at either bound."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def _pass_within(x: jax.Array, bound: float | None) -> jax.Array:
    """`x`, with a gradient where `|x| <= bound`."""
    return x if bound is None else jnp.where(jnp.abs(x) <= bound, x, _constant(x))


def _with_scaled_gradient(p: jax.Array, gain: float) -> jax.Array:
    """A parameter whose gradient is multiplied by a factor."""
    return straight_through(gain * p, p)


def _round(x: jax.Array) -> jax.Array:
    return straight_through(x, jnp.round(x))


def _shared_axes(axis: Any, a: jax.Array) -> tuple[int, ...]:
    """The axes that share a scale."""
    return tuple(set(range(a.ndim)) - {i % a.ndim for i in axis or ()})


def _fake_quant(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    low, high = layer.integers
    if layer.dynamic is not False:
        s = jnp.max(jnp.abs(x), _shared_axes(layer.granularity.axis, x), keepdims=True) / high
        return straight_through(x, s * jnp.round(x / s))
    s = (layer.high[...] - layer.low[...]) / (high - low)
    z = jnp.round(-layer.low[...] / s)
    # The recorded range, and what rounding its zero point adds at one end.
    least = jnp.minimum(layer.low[...], (low - z) * s)
    largest = jnp.maximum(layer.high[...], (high - z) * s)
    inside = jnp.where((x >= least) & (x <= largest), x, _constant(x))
    return straight_through(inside, s * (jnp.clip(jnp.round(x / s) + z, low, high) - z))


def _lsq(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    low, high = layer.integers
    n = x[0].size if layer.features else x.size / p["scale"].size
    s, b = (
        _with_scaled_gradient(p[name], 1 / (n * high) ** 0.5) if name in p else 0
        for name in _SCALES
    )
    return s * _round(_clip_inclusive((x - b) / s, low, high)) + b


_SCALES = ("scale", "offset")


def _tqt(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    low, high = layer.integers
    s = jnp.exp2(_constant(jnp.ceil(p["log2_t"]))) / (high + 1)
    s = s * (1 + jnp.log(2) * (p["log2_t"] - _constant(p["log2_t"])))
    return s * _round(_clip_inclusive(x / s, low, high))


def _pact(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    a = p["alpha"]
    y = jnp.where(x >= a, a, jnp.where(x >= 0, x, 0))
    s = a / (2**layer.bits - 1)
    return straight_through(y, s * jnp.round(y / s))


def _dorefa_weight(layer: Any, p: Params, w: jax.Array, g: jax.Array) -> jax.Array:
    n = 2**layer.bits - 1
    t = jnp.tanh(w) / _constant(jnp.max(jnp.abs(jnp.tanh(w))))
    return 2 * _round(n * (t + 1) / 2) / n - 1


def _dorefa_activation(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    n = 2**layer.bits - 1
    return _round(n * _clip_inclusive(x, 0, 1)) / n


def _ewgs(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    n = 2**layer.bits - 1
    r = _clip_inclusive((x - p["low"]) / (p["high"] - p["low"]), 0, 1)
    h = jnp.round(n * r) / n
    factor = _constant(1 + layer.delta * jnp.sign(p["scale"] * g) * (r - h))
    h = _constant(h) + factor * (r - _constant(r))
    y = 2 * h - 1 if layer.signed else h
    return p["scale"] * _constant(y) + _constant(p["scale"]) * (y - _constant(y))


def _scaled_sign(layer: Any, p: Params, w: jax.Array, g: jax.Array) -> jax.Array:
    sign = straight_through(_pass_within(w, layer.clip_value), jnp.where(w >= 0, 1, -1))
    if not getattr(layer, "scaled", False):
        return sign
    size = jnp.mean(jnp.abs(w), _shared_axes(layer.granularity.axis, w), keepdims=True)
    if layer.gradient == "bi_real":
        return _constant(size) * sign
    n = w.size / size.size
    return _constant(size) * sign + (w - _constant(w)) / n


def _twn(layer: Any, p: Params, w: jax.Array, g: jax.Array) -> jax.Array:
    large = jnp.abs(w) > layer.threshold * jnp.mean(jnp.abs(w))
    size = jnp.sum(jnp.abs(w) * large) / jnp.sum(large)
    return straight_through(_pass_within(w, layer.clip_value), size * jnp.sign(w) * large)


def _abs_mean(layer: Any, p: Params, w: jax.Array, g: jax.Array) -> jax.Array:
    axes = _shared_axes(layer.granularity.axis, w)
    size = jnp.mean(jnp.abs(w), axes, keepdims=True)
    nearest = size * jnp.clip(jnp.round(w / size), -1, 1)
    return straight_through(_pass_within(w, layer.clip_value), nearest)


def _ttq(layer: Any, p: Params, w: jax.Array, g: jax.Array) -> jax.Array:
    d = layer.threshold * jnp.max(jnp.abs(w))
    y = jnp.where(w > d, p["positive"], jnp.where(w < -d, -p["negative"], 0))
    size = jnp.where(w > d, p["positive"], jnp.where(w < -d, p["negative"], 1))
    return y + _constant(size) * (w - _constant(w))


def _formula_of(without_rounding: Callable[..., jax.Array]) -> Callable[..., tuple[Any, ...]]:
    """The formula of a quantizer: JAX's gradient of the quantizer without its rounding."""

    def formula(layer: Any, x: jax.Array, g: jax.Array) -> tuple[Any, ...]:
        params = {name: p[...] for name, p in nnx.state(layer, nnx.Param).items()}  # type: ignore[index]
        pull = jax.vjp(lambda params, x: without_rounding(layer, params, x, g), params, x)[1]
        dparams, dx = pull(g)
        return nnx.State(dparams) if dparams else None, dx

    return formula


# Quantizers of gradients.


def _gradient_quant(layer: Any, x: jax.Array, g: jax.Array) -> tuple[None, jax.Array]:
    s = jnp.max(jnp.abs(g), _shared_axes(layer.granularity.axis, g), keepdims=True)
    s = s / (2 ** (layer.bits - 1) - 1)
    return None, straight_through(g, s * jnp.round(g / s))


def _dorefa_gradient(layer: Any, x: jax.Array, g: jax.Array) -> tuple[None, jax.Array]:
    noise = jax.random.uniform(nnx.clone(layer.rngs)(), g.shape, jnp.float32)
    n, most = 2**layer.bits - 1, jnp.max(jnp.abs(g), 1, keepdims=True)
    q = jnp.clip(jnp.ceil(n * (g / (2 * most) + 0.5) - noise), 0, n)
    return None, straight_through(g, 2 * most * (q / n - 0.5))


def _quantizer_entry(
    module: type,
    keeps: str,
    gain: str,
    source: str,
    formula: Callable[..., tuple[Any, ...]],
    *,
    examples: Mapping[str, Example],
    curves: Mapping[str, Curve] | None = None,
    operations: Mapping[Any, str] = MappingProxyType({}),
    **workload: Any,
) -> Entry:
    def large(cls: Any) -> tuple[Any, ...]:
        arguments: Any = {"rngs": nnx.Rngs(0)} if cls is DoReFaGradient else workload
        return cls(**arguments), _many()

    workloads = {"4096x1024": large}
    return Entry(
        module.__name__,
        "quantizers",
        module,
        None,
        "surrogate",
        keeps,
        gain,
        source,
        formula,
        curves or {},
        examples,
        workloads,
        operations,
    )


def _curve(cls: Any, **kwargs: Any) -> dict[str, Curve]:
    """The graph of a quantizer, which is built when it is drawn."""
    return {"": Curve(lambda x: cls(**kwargs)(x))}


_TWO_BITS = "2 bits, as observed"

ENTRIES = (
    _quantizer_entry(
        FakeQuant,
        "nothing; with a recorded range, a bit an element",
        "2 to 8 bits; codes that layers keep",
        "arXiv:1712.05877",
        _formula_of(_fake_quant),
        examples={
            "4 bits, channels": _on_few(4, axis=-1),
            "3 bits, affine, recorded": _on_few(
                3,
                symmetric=False,
                calibration="percentile",
                percentile=90.0,
                dynamic=False,
                observed=True,
            ),
        },
    ),
    _quantizer_entry(
        LSQ,
        "x, scale",
        "a scale that trains; the same gradient for parts of a batch",
        "arXiv:1902.08153",
        _formula_of(_lsq),
        examples={
            "3 bits, features": _on_few(3, features=1),
            "2 bits, channels": _on_few(2, axis=-1, observed=True),
        },
        curves=_curve(LSQ, bits=2, grad_scale=1.0),
        bits=4,
    ),
    _quantizer_entry(
        LSQPlus,
        "x, scale, offset",
        "a scale and an offset that train",
        "arXiv:2004.09576",
        _formula_of(_lsq),
        examples={
            # Where all are inside, the gradient of the offset is 0, and nothing but rounding.
            "3 bits, features": _on_few(3, features=1, observed=0.8),
            "2 bits, channels, both bounds": _on_the_grid(2, axis=-1),
        },
        operations={elementwise_surrogate: "2 bits, channels, both bounds"},
        bits=4,
    ),
    _quantizer_entry(
        PACT,
        "two bits an element",
        "a bound that trains, from bits and not from x",
        "arXiv:1805.06085",
        _formula_of(_pact),
        examples={
            "2 bits": _on_few(2, alpha=0.8),
            "2 bits, bound met": _on_the_grid(2, alpha=0.75),
        },
        operations={elementwise_surrogate: "2 bits, bound met"},
        curves=_curve(PACT, bits=2, alpha=1.0),
        bits=4,
    ),
    _quantizer_entry(
        DoReFaWeight,
        "w",
        "weights in [-1, 1]; exact far out, where 1 - tanh^2 cancels",
        "arXiv:1606.06160",
        _formula_of(_dorefa_weight),
        examples={"2 bits": _on_few(2)},
        bits=4,
    ),
    _quantizer_entry(
        DoReFaActivation,
        "a bit an element",
        "activations in [0, 1]",
        "arXiv:1606.06160",
        _formula_of(_dorefa_activation),
        examples={"2 bits": _on_few(2)},
        curves=_curve(DoReFaActivation, bits=2),
        bits=4,
    ),
    _quantizer_entry(
        DoReFaGradient,
        "a key",
        "a gradient of few bits, right in the mean",
        "arXiv:1606.06160",
        _dorefa_gradient,
        examples={"3 bits": made(3, inputs=(_few,), call=on_a_copy)},
        operations={quantize_gradient: "3 bits"},
    ),
    _quantizer_entry(
        GradientQuant,
        "nothing; stochastic, a key",
        "a gradient of few bits",
        "arXiv:1502.02551",
        _gradient_quant,
        examples={
            "4 bits, nearest, a range for each of two axes": made(
                4, stochastic=False, axis=(0, -1), inputs=(lambda: normal(8, 3, 2),)
            )
        },
        operations={quantize_gradient: "4 bits, nearest, a range for each of two axes"},
        stochastic=False,
    ),
    _quantizer_entry(
        TQT,
        "x, log2_t",
        "a scale that trains, and is a power of two",
        "arXiv:1903.08066",
        _formula_of(_tqt),
        examples={_TWO_BITS: _on_few(2, observed=True)},
        curves=_curve(TQT, bits=2),
        bits=4,
    ),
    _quantizer_entry(
        EWGS,
        "x, low, high, scale",
        "a gradient scaled by the rounding error; an interval that trains",
        "arXiv:2104.00903",
        _formula_of(_ewgs),
        examples={
            _TWO_BITS: _on_few(2, delta=0.3, observed=True),
            "3 bits, unsigned": _on_few(3, signed=False, delta=0.3),
        },
        curves=_curve(EWGS, bits=2, delta=0.3),
        bits=4,
    ),
    _quantizer_entry(
        BinaryWeight,
        "a bit an element, the scales",
        "weights of one bit, and their codes",
        "arXiv:1603.05279",
        _formula_of(_scaled_sign),
        examples={"Bi-Real": _on_few(), "XNOR, one scale": _on_few(axis=None, gradient="xnor")},
    ),
    _quantizer_entry(
        BinaryActivation,
        "a bit an element",
        "activations of one bit, and their codes",
        "arXiv:1602.02830",
        _formula_of(_scaled_sign),
        examples={"bound": _on_few(0.8)},
        curves=_curve(BinaryActivation),
    ),
    _quantizer_entry(
        TWN,
        "nothing; with a bound, a bit an element",
        "ternary weights of the size of the large ones",
        "arXiv:1605.04711",
        _formula_of(_twn),
        examples={"no bound": _on_few(), "bound": _on_few(clip_value=1.0)},
    ),
    _quantizer_entry(
        AbsMean,
        "nothing; with a bound, a bit an element",
        "the ternary weights of BitNet b1.58",
        "arXiv:2402.17764",
        _formula_of(_abs_mean),
        examples={"one scale": _on_few(), "channels, bound": _on_few(axis=-1, clip_value=1.0)},
    ),
    _quantizer_entry(
        TTQ,
        "two bits an element, both sizes",
        "ternary weights whose sizes train, from codes and not from w",
        "arXiv:1612.01064",
        _formula_of(_ttq),
        examples={"observed": _on_few(0.3, observed=True)},
    ),
)
