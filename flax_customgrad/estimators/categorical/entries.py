"""The catalogue's entries of the categorical family."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.estimators.categorical.gumbel_softmax import (
    GumbelSoftmax,
    gumbel_softmax,
    soft_sample,
)
from flax_customgrad.estimators.categorical.reinmax import ReinMax, one_hot_sample, reinmax
from flax_customgrad.estimators.categorical.top_k import TopKST, top_k, top_k_st
from flax_customgrad.registry.entry import Curve, Entry, Example
from flax_customgrad.registry.examples import applied, made, normal, on_a_copy


def _few() -> jax.Array:
    return 2 * normal(8, 5)


def _first_axis() -> jax.Array:
    return 2 * normal(8, 4, 3)


def _masked() -> jax.Array:
    """Classes on the axis before the last, some of them masked; another axis of size 1."""
    logits = 2 * normal(8, 1, 4, 3)
    return logits.at[:, :, 1, ::2].set(-jnp.inf).at[::2, :, 3, 1].set(-jnp.inf)


def _masked_with_ties() -> jax.Array:
    """The same rounded to multiples of 1/2, so that classes of some rows are equally likely."""
    return jnp.round(_masked()) / 2


def _many() -> jax.Array:
    return normal(4096, 1024)


def _many_bf16() -> jax.Array:
    return normal(4096, 1024, dtype=jnp.bfloat16)


def _key() -> jax.Array:
    return jax.random.key(2)


def _temperature() -> jax.Array:
    return jnp.asarray(0.7)


def _temperatures() -> jax.Array:
    return 1.5 + 0.1 * normal(8, 1)


def _temperature_an_example() -> jax.Array:
    """One number for the rows of each example."""
    return 1.5 + 0.1 * normal(8, 1, 1, 1)


def _noise(logits: jax.Array, key: jax.Array | None) -> jax.Array:
    if key is None:
        return jnp.zeros(logits.shape)
    return jax.random.gumbel(key, logits.shape, jnp.float32)


# Formulas: autodiff of a softmax; for ReinMax of two, one of which has the value p1. A masked class
# gets a finite logit so low that its weight is 0: 0 times infinity would be NaN.


def _finite(logits: jax.Array) -> jax.Array:
    return jnp.maximum(logits, -1e4)


def _softmax(
    logits: jax.Array, key: jax.Array | None, temperature: Any, g: jax.Array, axis: int = -1
) -> tuple[jax.Array, jax.Array | None]:
    def soft(logits: jax.Array, temperature: Any) -> jax.Array:
        return jax.nn.softmax((_finite(logits) + _noise(logits, key)) / temperature, axis)

    dlogits, dtemperature = jax.vjp(soft, logits, temperature)[1](g)
    return dlogits, dtemperature if isinstance(temperature, jax.Array) else None


def _gumbel_softmax(
    logits: jax.Array, key: jax.Array, temperature: Any, g: jax.Array, axis: int = -1, **_: Any
) -> tuple[Any, ...]:
    dlogits, dtemperature = _softmax(logits, key, temperature, g, axis)
    return dlogits, None, dtemperature


def _top_k(
    logits: jax.Array,
    k: int,
    temperature: Any,
    g: jax.Array,
    key: jax.Array | None = None,
    axis: int = -1,
) -> tuple[Any, ...]:
    dlogits, dtemperature = _softmax(logits, key, temperature, g, axis)
    return dlogits, None, dtemperature


def _reinmax(
    logits: jax.Array, key: jax.Array, temperature: Any, g: jax.Array, axis: int = -1
) -> tuple[Any, ...]:
    def softmax(z: jax.Array) -> jax.Array:
        return jax.nn.softmax(z, axis)

    sample = jnp.argmax(logits + _noise(logits, key), axis)
    y = jax.nn.one_hot(sample, logits.shape[axis], dtype=g.dtype, axis=axis)
    p1 = (y + softmax(_finite(logits) / temperature)) / 2
    log_p1 = jnp.log(jnp.maximum(p1, jnp.finfo(p1.dtype).tiny))
    (of_p0,), (of_p1,) = (jax.vjp(softmax, z)[1](g) for z in (_finite(logits), log_p1))
    return 2 * of_p1 - of_p0 / 2, None, None


def _layer_formula(formula: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The formula of a layer, from that of a function of the logits, a key and a temperature."""

    def formula_of_layer(layer: Any, logits: jax.Array, g: jax.Array) -> tuple[Any, jax.Array]:
        key = nnx.clone(layer.rngs)() if getattr(layer, "sample", True) else None
        if not isinstance(layer.temperature, nnx.Param):
            return None, formula(logits, key, layer.temperature, g, axis=layer.axis)[0]
        temperature = layer.temperature[...]
        dlogits, *_, dtemperature = formula(logits, key, temperature, g, axis=layer.axis)
        if dtemperature is None:
            dtemperature = jnp.zeros_like(temperature)
        return nnx.State({"temperature": dtemperature}), dlogits

    return formula_of_layer


def _layer(*args: Any, inputs: Callable[[], jax.Array] = _few, **kwargs: Any) -> Example:
    return made(*args, inputs=(inputs,), call=on_a_copy, **kwargs)


def _learned_temperature(*args: Any, **kwargs: Any) -> Example:
    """An example of a layer whose temperature is a parameter."""
    return lambda cls: _layer(*args, nnx.Param(jnp.asarray(0.7)), **kwargs)(cls)


def _first_of_two(function: Callable[..., jax.Array]) -> Curve:
    """The first of two classes, as a function of its logit; that of the other is 0."""
    return Curve(lambda x: function(jnp.stack([x, jnp.zeros_like(x)], -1))[..., 0], -4.0, 4.0)


def _three_sampled(function: Any) -> tuple[Any, ...]:
    return partial(function, key=jax.random.key(3)), _few(), 3, 0.7


ENTRIES = (
    Entry(
        "gumbel_softmax",
        "categorical",
        gumbel_softmax,
        None,
        "surrogate",
        keeps="the soft sample",
        gain="zeros and ones; right for masked classes, low temperatures, half precision",
        source="arXiv:1611.01144",
        formula=_gumbel_softmax,
        curves={
            "temperature 1": _first_of_two(lambda x: gumbel_softmax(x, None)),
            "temperature 0.5": _first_of_two(lambda x: gumbel_softmax(x, None, 0.5)),
        },
        examples={
            "hard": applied(_few, _key, _temperature),
            "soft": applied(_few, _key, _temperature, hard=False),
            "hard, a temperature a row": applied(_few, _key, _temperatures),
            "soft, first axis": applied(_first_axis, _key, 0.5, hard=False, axis=1),
            "soft, masked, 4-D, a temperature an example": applied(
                _masked, _key, _temperature_an_example, hard=False, axis=-2
            ),
        },
        operations={soft_sample: "soft, masked, 4-D, a temperature an example"},
        workloads={
            "4096x1024": applied(_many, _key, 0.7),
            "4096x1024, bf16": applied(_many_bf16, _key, 0.7),
            "4096x1024, soft": applied(_many, _key, 0.7, hard=False),
        },
    ),
    Entry(
        "GumbelSoftmax",
        "categorical",
        GumbelSoftmax,
        None,
        "surrogate",
        keeps="the soft sample",
        gain="the same, with keys of its own",
        source="arXiv:1611.01144",
        formula=_layer_formula(_softmax),
        examples={
            "soft, a learned temperature": _learned_temperature(hard=False),
            "hard, first axis": _layer(1.5, axis=0),
        },
        workloads={"4096x1024": _layer(0.7, inputs=_many)},
    ),
    Entry(
        "reinmax",
        "categorical",
        reinmax,
        None,
        "surrogate",
        keeps="logits, temperature, the index of the sample",
        gain="a gradient of second order, as the paper's own code has it",
        source="arXiv:2304.08612",
        formula=_reinmax,
        curves={"temperature 1": _first_of_two(lambda x: reinmax(x, None))},
        examples={
            "last axis": applied(_few, _key, _temperature),
            "first axis, a temperature a row": applied(
                _first_axis, _key, lambda: 1.5 + 0.1 * normal(8, 1, 3), axis=1
            ),
            "masked, 4-D, a temperature an example": applied(
                _masked, _key, _temperature_an_example, axis=-2
            ),
        },
        operations={one_hot_sample: "masked, 4-D, a temperature an example"},
        workloads={
            "4096x1024": applied(_many, _key, 1.5),
            "4096x1024, bf16": applied(_many_bf16, _key, 1.5),
        },
    ),
    Entry(
        "ReinMax",
        "categorical",
        ReinMax,
        None,
        "surrogate",
        keeps="logits, the index of the sample",
        gain="the same, with keys of its own",
        source="arXiv:2304.08612",
        formula=_layer_formula(_reinmax),
        examples={
            "last axis": _layer(1.5),
            "a temperature that could learn": _learned_temperature(),
        },
        workloads={"4096x1024": _layer(1.5, inputs=_many)},
    ),
    Entry(
        "top_k_st",
        "categorical",
        top_k_st,
        None,
        "surrogate",
        keeps="the softmax",
        gain="exactly k ones, also at ties; right for masked classes, low temperatures",
        source="arXiv:1903.06059",
        formula=_top_k,
        curves={"1 of 2": _first_of_two(lambda x: top_k_st(x, 1))},
        examples={
            "2 of 5": applied(_few, 2, _temperature),
            "2 of 4, first axis, a temperature a row": applied(
                _first_axis, 2, lambda: 1.5 + 0.1 * normal(8, 1, 3), axis=1
            ),
            "3 of 5 sampled": _three_sampled,
            "2 of 4, masked, with ties, 4-D, a temperature an example": applied(
                _masked_with_ties, 2, _temperature_an_example, axis=-2
            ),
        },
        operations={top_k: "2 of 4, masked, with ties, 4-D, a temperature an example"},
        workloads={"4096x1024": applied(_many, 32, 0.7)},
    ),
    Entry(
        "TopKST",
        "categorical",
        TopKST,
        None,
        "surrogate",
        keeps="the softmax",
        gain="the same as a layer",
        source="arXiv:1903.06059",
        formula=_layer_formula(_softmax),
        examples={
            "2 of 5 sampled, a learned temperature": _learned_temperature(2, sample=True),
            "2 of 5": _layer(2, 0.7),
        },
        workloads={"4096x1024": _layer(32, inputs=_many)},
    ),
)
