"""The catalogue's entries of the quantizers.

Their formula is stop_gradient's: JAX differentiates what a quantizer is without its rounding, which
is added as a constant.
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
from flax_customgrad.registry.examples import made, normal

Params = Mapping[str, jax.Array]


def _few() -> jax.Array:
    return normal(8, 6)


def _many() -> jax.Array:
    return normal(4096, 1024)


def _made(*args: Any, call: Any = None, observed: bool = False, **kwargs: Any) -> Example:
    """A quantizer, and weights or activations; perhaps one that has observed them."""

    def make(cls: Any) -> tuple[Any, ...]:
        layer, x = cls(*args, **kwargs), _few()
        if observed:
            layer.observe(x)
        return (layer, x) if call is None else (call, layer, x)

    return make


def _on_the_grid(*args: Any, **kwargs: Any) -> Example:
    """A quantizer in steps of 1/4, and x that meets ties and both bounds."""

    def make(cls: Any) -> tuple[Any, ...]:
        layer, x = cls(*args, **kwargs), jnp.round(6 * normal(8, 1, 11)) / 8
        if isinstance(layer, LSQPlus):
            layer.scale = nnx.Param(jnp.full((1, 1, 11), 0.25).at[..., 0].set(0.5))
            layer.offset = nnx.Param(jnp.full((1, 1, 11), 0.125).at[..., 1].set(0))
        return layer, x

    return make


# What each one is without its rounding: a function of the quantizer, its parameters, x and, where
# the gradient depends on it, g.

_held = lax.stop_gradient


def _instead(a: jax.Array, q: Any) -> jax.Array:
    """A value with the gradient of another."""
    return a + _held(q - a)


def _between(x: jax.Array, low: Any, high: Any) -> jax.Array:
    """Clips, and has the gradient of x at either end."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def _within(x: jax.Array, bound: float | None) -> jax.Array:
    """x, with a gradient where |x| <= bound."""
    return x if bound is None else jnp.where(jnp.abs(x) <= bound, x, _held(x))


def _slowed(p: jax.Array, gain: float) -> jax.Array:
    """A parameter whose gradient is multiplied."""
    return _instead(gain * p, p)


def _rounded(x: jax.Array) -> jax.Array:
    return _instead(x, jnp.round(x))


def _others(axis: Any, a: jax.Array) -> tuple[int, ...]:
    """The axes that share a scale."""
    return tuple(set(range(a.ndim)) - {i % a.ndim for i in axis or ()})


def _fake_quant(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    low, high = layer.integers
    if layer.dynamic:
        s = jnp.max(jnp.abs(x), _others(layer.granularity.axis, x), keepdims=True) / high
        return _instead(x, s * jnp.round(x / s))
    s = (layer.high[...] - layer.low[...]) / (high - low)
    z = jnp.round(-layer.low[...] / s)
    inside = jnp.where((x / s + z >= low) & (x / s + z <= high), x, _held(x))
    return _instead(inside, s * (jnp.clip(jnp.round(x / s) + z, low, high) - z))


def _lsq(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    low, high = layer.integers
    n = x[0].size if layer.features else x.size / p["scale"].size
    s, b = (_slowed(p[name], 1 / (n * high) ** 0.5) if name in p else 0 for name in _SCALES)
    return s * _rounded(_between((x - b) / s, low, high)) + b


_SCALES = ("scale", "offset")


def _tqt(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    low, high = layer.integers
    s = jnp.exp2(_held(jnp.ceil(p["log2_t"]))) / (high + 1)
    s = s * (1 + jnp.log(2) * (p["log2_t"] - _held(p["log2_t"])))
    return s * _rounded(_between(x / s, low, high))


def _pact(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    a = p["alpha"]
    y = jnp.where(x >= a, a, jnp.where(x >= 0, x, 0))
    s = a / (2**layer.bits - 1)
    return _instead(y, s * jnp.round(y / s))


def _dorefa_weight(layer: Any, p: Params, w: jax.Array, g: jax.Array) -> jax.Array:
    n = 2**layer.bits - 1
    t = jnp.tanh(w) / _held(jnp.max(jnp.abs(jnp.tanh(w))))
    return 2 * _rounded(n * (t + 1) / 2) / n - 1


def _dorefa_activation(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    n = 2**layer.bits - 1
    return _rounded(n * _between(x, 0, 1)) / n


def _ewgs(layer: Any, p: Params, x: jax.Array, g: jax.Array) -> jax.Array:
    n = 2**layer.bits - 1
    r = _between((x - p["low"]) / (p["high"] - p["low"]), 0, 1)
    h = jnp.round(n * r) / n
    factor = _held(1 + layer.delta * jnp.sign(p["scale"] * g) * (r - h))
    h = _held(h) + factor * (r - _held(r))
    y = 2 * h - 1 if layer.signed else h
    return p["scale"] * _held(y) + _held(p["scale"]) * (y - _held(y))


def _scaled_sign(layer: Any, p: Params, w: jax.Array, g: jax.Array) -> jax.Array:
    sign = _instead(_within(w, layer.clip_value), jnp.where(w >= 0, 1, -1))
    if not getattr(layer, "scaled", False):
        return sign
    size = jnp.mean(jnp.abs(w), _others(layer.granularity.axis, w), keepdims=True)
    if layer.gradient == "bi_real":
        return _held(size) * sign
    n = w.size / size.size
    return _held(size) * sign + (w - _held(w)) / n


def _twn(layer: Any, p: Params, w: jax.Array, g: jax.Array) -> jax.Array:
    large = jnp.abs(w) > layer.threshold * jnp.mean(jnp.abs(w))
    size = jnp.sum(jnp.abs(w) * large) / jnp.sum(large)
    return _instead(_within(w, layer.clip_value), size * jnp.sign(w) * large)


def _abs_mean(layer: Any, p: Params, w: jax.Array, g: jax.Array) -> jax.Array:
    axes = _others(layer.granularity.axis, w)
    size = jnp.mean(jnp.abs(w), axes, keepdims=True)
    nearest = size * jnp.clip(jnp.round(w / size), -1, 1)
    return _instead(_within(w, layer.clip_value), nearest)


def _ttq(layer: Any, p: Params, w: jax.Array, g: jax.Array) -> jax.Array:
    d = layer.threshold * jnp.max(jnp.abs(w))
    y = jnp.where(w > d, p["positive"], jnp.where(w < -d, -p["negative"], 0))
    size = jnp.where(w > d, p["positive"], jnp.where(w < -d, p["negative"], 1))
    return y + _held(size) * (w - _held(w))


def _of(without_rounding: Callable[..., jax.Array]) -> Callable[..., tuple[Any, ...]]:
    """The formula of a quantizer, as JAX differentiates it."""

    def formula(layer: Any, x: jax.Array, g: jax.Array) -> tuple[Any, ...]:
        params = {name: p[...] for name, p in nnx.state(layer, nnx.Param).items()}  # type: ignore[index]
        pull = jax.vjp(lambda params, x: without_rounding(layer, params, x, g), params, x)[1]
        dparams, dx = pull(g)
        return nnx.State(dparams) if dparams else None, dx

    return formula


# Gradients that are quantized themselves.


def _nearest(layer: Any, x: jax.Array, g: jax.Array) -> tuple[None, jax.Array]:
    s = jnp.max(jnp.abs(g), _others(layer.granularity.axis, g), keepdims=True)
    s = s / (2 ** (layer.bits - 1) - 1)
    return None, _instead(g, s * jnp.round(g / s))


def _noisy(layer: Any, x: jax.Array, g: jax.Array) -> tuple[None, jax.Array]:
    noise = jax.random.uniform(nnx.clone(layer.rngs)(), g.shape, jnp.float32)
    n, most = 2**layer.bits - 1, jnp.max(jnp.abs(g), 1, keepdims=True)
    q = jnp.clip(jnp.ceil(n * (g / (2 * most) + 0.5) - noise), 0, n)
    return None, _instead(g, 2 * most * (q / n - 0.5))


def _counted(layer: Any, x: jax.Array) -> jax.Array:
    """Calls a layer that counts its draws where `check_vjp` calls it more than once."""
    return nnx.clone(layer)(x)


def _entry(
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
    """The graph of a quantizer, made when it is drawn."""
    return {"": Curve(lambda x: cls(**kwargs)(x))}


_TWO_BITS = "2 bits, as observed"

ENTRIES = (
    _entry(
        FakeQuant,
        "nothing; with a recorded range, a bit an element",
        "2 to 8 bits; codes that layers keep",
        "arXiv:1712.05877",
        _of(_fake_quant),
        examples={
            "4 bits, channels": _made(4, axis=-1),
            "3 bits, affine, recorded": _made(
                3,
                symmetric=False,
                calibration="percentile",
                percentile=90.0,
                dynamic=False,
                observed=True,
            ),
        },
    ),
    _entry(
        LSQ,
        "x, scale",
        "a scale that trains; the same gradient for parts of a batch",
        "arXiv:1902.08153",
        _of(_lsq),
        examples={
            "3 bits, features": _made(3, features=1),
            "2 bits, channels": _made(2, axis=-1, observed=True),
        },
        curves=_curve(LSQ, bits=2, grad_scale=1.0),
        bits=4,
    ),
    _entry(
        LSQPlus,
        "x, scale, offset",
        "a scale and an offset that train",
        "arXiv:2004.09576",
        _of(_lsq),
        examples={
            "3 bits, features": _made(3, features=1, observed=True),
            "2 bits, channels, both bounds": _on_the_grid(2, axis=-1),
        },
        operations={elementwise_surrogate: "2 bits, channels, both bounds"},
        bits=4,
    ),
    _entry(
        PACT,
        "two bits an element",
        "a bound that trains, from bits and not from x",
        "arXiv:1805.06085",
        _of(_pact),
        examples={"2 bits": _made(2, alpha=0.8), "2 bits, bound met": _on_the_grid(2, alpha=0.75)},
        operations={elementwise_surrogate: "2 bits, bound met"},
        curves=_curve(PACT, bits=2, alpha=1.0),
        bits=4,
    ),
    _entry(
        DoReFaWeight,
        "w",
        "weights in [-1, 1]; exact far out, where 1 - tanh^2 cancels",
        "arXiv:1606.06160",
        _of(_dorefa_weight),
        examples={"2 bits": _made(2)},
        bits=4,
    ),
    _entry(
        DoReFaActivation,
        "a bit an element",
        "activations in [0, 1]",
        "arXiv:1606.06160",
        _of(_dorefa_activation),
        examples={"2 bits": _made(2)},
        curves=_curve(DoReFaActivation, bits=2),
        bits=4,
    ),
    _entry(
        DoReFaGradient,
        "a key",
        "a gradient of few bits, right in the mean",
        "arXiv:1606.06160",
        _noisy,
        examples={"3 bits": made(3, inputs=(_few,), call=_counted)},
        operations={quantize_gradient: "3 bits"},
    ),
    _entry(
        GradientQuant,
        "nothing; stochastic, a key",
        "a gradient of few bits",
        "arXiv:1502.02551",
        _nearest,
        examples={
            "4 bits, nearest, a range for each of two axes": made(
                4, stochastic=False, axis=(0, -1), inputs=(lambda: normal(8, 3, 2),)
            )
        },
        operations={quantize_gradient: "4 bits, nearest, a range for each of two axes"},
        stochastic=False,
    ),
    _entry(
        TQT,
        "x, log2_t",
        "a scale that trains, and is a power of two",
        "arXiv:1903.08066",
        _of(_tqt),
        examples={_TWO_BITS: _made(2, observed=True)},
        curves=_curve(TQT, bits=2),
        bits=4,
    ),
    _entry(
        EWGS,
        "x, low, high, scale",
        "a gradient that knows the rounding error; an interval that trains",
        "arXiv:2104.00903",
        _of(_ewgs),
        examples={
            _TWO_BITS: _made(2, delta=0.3, observed=True),
            "3 bits, unsigned": _made(3, signed=False, delta=0.3),
        },
        curves=_curve(EWGS, bits=2, delta=0.3),
        bits=4,
    ),
    _entry(
        BinaryWeight,
        "a bit an element, the scales",
        "weights of one bit, and their codes",
        "arXiv:1603.05279",
        _of(_scaled_sign),
        examples={"Bi-Real": _made(), "XNOR, one scale": _made(axis=None, gradient="xnor")},
    ),
    _entry(
        BinaryActivation,
        "a bit an element",
        "activations of one bit, and their codes",
        "arXiv:1602.02830",
        _of(_scaled_sign),
        examples={"bound": _made(0.8)},
        curves=_curve(BinaryActivation),
    ),
    _entry(
        TWN,
        "nothing; with a bound, a bit an element",
        "ternary weights of the size of the large ones",
        "arXiv:1605.04711",
        _of(_twn),
        examples={"no bound": _made(), "bound": _made(clip_value=1.0)},
    ),
    _entry(
        AbsMean,
        "nothing; with a bound, a bit an element",
        "the ternary weights of BitNet b1.58",
        "arXiv:2402.17764",
        _of(_abs_mean),
        examples={"one scale": _made(), "channels, bound": _made(axis=-1, clip_value=1.0)},
    ),
    _entry(
        TTQ,
        "two bits an element, both sizes",
        "ternary weights whose sizes train, from codes and not from w",
        "arXiv:1612.01064",
        _of(_ttq),
        examples={"observed": _made(0.3, observed=True)},
    ),
)
