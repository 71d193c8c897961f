"""The catalogue's entries of rounding and signs with surrogate gradients."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_customgrad.estimators.rounding import heaviside, rounding, scaled_sign, sign, ternary_step
from flax_customgrad.numerics.elementwise import elementwise_surrogate
from flax_customgrad.registry.entry import Curve, Entry, Example
from flax_customgrad.registry.examples import applied, made, normal


def _few() -> jax.Array:
    return 1.5 * normal(8, 3)


def _halves() -> jax.Array:
    """Multiples of 1/2, so that bounds and ties are met."""
    return jnp.round(3 * normal(8, 2, 3)) / 2


def _many() -> jax.Array:
    return normal(4096, 1024)


def _key() -> jax.Array:
    return jax.random.key(0)


def _layer(*args: Any, inputs: Callable[[], jax.Array] = _few, **kwargs: Any) -> Example:
    return lambda cls: (cls(*args, **kwargs), inputs())


# Formulas: each returns the gradients of a function, given its arguments and g.


def _straight_through(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (g,)


def _straight_through_and_key(x: jax.Array, key: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    return g, None


def _clipped(
    x: jax.Array, low: Any, high: Any, g: jax.Array, gradient: str = "pass_through"
) -> tuple[jax.Array, None, None]:
    inside = (low <= x) & (x <= high) if gradient == "masked" else 1
    return g * inside, None, None


def _where_within(layer: Any, x: jax.Array, g: jax.Array) -> tuple[None, jax.Array]:
    bound = np.inf if layer.clip_value is None else layer.clip_value
    return None, g * (jnp.abs(x) <= bound)


def _approx_sign(layer: Any, x: jax.Array, g: jax.Array) -> tuple[None, jax.Array]:
    parabola = lambda x: jnp.where(x < 0, 2 * x + x**2, 2 * x - x**2)  # noqa: E731
    return None, jnp.where(jnp.abs(x) < 1, jax.vjp(parabola, x)[1](g)[0], 0)


def _swish_sign(layer: Any, x: jax.Array, g: jax.Array) -> tuple[None, jax.Array]:
    def swish(x: jax.Array) -> jax.Array:
        s = jax.nn.sigmoid(layer.beta * x)
        return 2 * s * (1 + layer.beta * x * (1 - s)) - 1

    return None, jax.vjp(swish, x)[1](g)[0]


def _channel_mean(w: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(jnp.abs(w).reshape(-1, w.shape[-1]).mean(0))


def _magnitude_aware(layer: Any, w: jax.Array, g: jax.Array) -> tuple[None, jax.Array]:
    return None, g * _channel_mean(w) * (jnp.abs(w) <= layer.clip_value)


def _xnor(layer: Any, w: jax.Array, g: jax.Array) -> tuple[None, jax.Array]:
    n = w.size // w.shape[-1]
    return None, g * (1 / n + _channel_mean(w) * (jnp.abs(w) <= layer.clip_value))


def _surrogate_entry(
    module: Callable[..., Any],
    keeps: str,
    gain: str,
    formula: Callable[..., tuple[Any, ...]],
    source: str = "arXiv:1308.3432",
    *,
    examples: Mapping[str, Example],
    workload: Example,
    curves: Mapping[str, Curve],
    operations: Mapping[Any, str] = MappingProxyType({}),
) -> Entry:
    return Entry(
        module.__name__,
        "rounding",
        module,
        None,
        "surrogate",
        keeps,
        gain,
        source,
        formula,
        curves,
        examples,
        {"4096x1024": workload},
        operations,
    )


def _rounding_entry(function: Callable[..., jax.Array], gain: str) -> Entry:
    return _surrogate_entry(
        function,
        "nothing",
        gain,
        _straight_through,
        examples={"alone": applied(_few)},
        workload=applied(_many),
        curves={"": Curve(function)},
    )


_PASSES_GRADIENT = "passes the gradient on"

_ROUNDING = (
    _rounding_entry(rounding.round_ste, f"{_PASSES_GRADIENT}; halves to even"),
    _rounding_entry(rounding.floor_ste, _PASSES_GRADIENT),
    _rounding_entry(rounding.ceil_ste, _PASSES_GRADIENT),
    _rounding_entry(rounding.trunc_ste, _PASSES_GRADIENT),
    _surrogate_entry(
        rounding.clip_ste,
        "nothing; masked, a mask",
        "1 at a bound, where jnp.clip has 1/2",
        _clipped,
        examples={
            "passing": applied(_few, -1.0, 0.5),
            "masked, bounds that are met, for each feature": applied(
                _halves,
                lambda: jnp.array([[-1.0], [-0.5]]),
                0.5,
                gradient="masked",
            ),
        },
        operations={elementwise_surrogate: "masked, bounds that are met, for each feature"},
        workload=applied(_many, -1.0, 1.0, gradient="masked"),
        curves={
            "passing": Curve(lambda x: rounding.clip_ste(x, -1, 1)),
            "masked": Curve(lambda x: rounding.clip_ste(x, -1, 1, gradient="masked")),
        },
    ),
    _surrogate_entry(
        rounding.stochastic_round,
        "nothing",
        f"{_PASSES_GRADIENT}; x in the mean",
        _straight_through_and_key,
        "arXiv:1502.02551",
        examples={"alone": applied(_few, _key)},
        workload=applied(_many, _key),
        curves={"": Curve(lambda x: rounding.stochastic_round(x, jax.random.key(0)))},
    ),
    _surrogate_entry(
        rounding.StochasticRound,
        "nothing",
        f"{_PASSES_GRADIENT}; x in the mean",
        lambda layer, x, g: (None, g),
        "arXiv:1502.02551",
        examples={"alone": made(inputs=(_few,))},
        workload=made(inputs=(_many,)),
        curves={},
    ),
)


def _sign_entry(
    cls: type,
    keeps: str,
    gain: str,
    source: str,
    formula: Callable[..., tuple[Any, ...]] = _where_within,
    *,
    examples: Mapping[str, Example],
    curves: Mapping[str, Curve] | None = None,
) -> Entry:
    return _surrogate_entry(
        cls,
        keeps,
        gain,
        formula,
        source,
        examples=examples,
        workload=_layer(inputs=_many),
        curves={"": Curve(cls())} if curves is None else curves,
    )


_MASK = "a mask; without bounds nothing"
_WEIGHTS = {
    "dense": _layer(),
    "kernel of a convolution": _layer(0.5, inputs=lambda: normal(8, 3, 2, 4)),
}


def _beside_ones(layer: Callable[[jax.Array], jax.Array]) -> Curve:
    """A weight beside one of 1 in the same channel."""
    return Curve(jax.vmap(lambda w: layer(jnp.stack([w, jnp.ones_like(w)])[:, None])[0, 0]))


_SIGNS = (
    _sign_entry(
        sign.SteSign,
        _MASK,
        "binary activations and weights",
        "arXiv:1602.02830",
        examples={"bound": _layer(), "no bound": _layer(None)},
        curves={"": Curve(sign.SteSign()), "no bound": Curve(sign.SteSign(None))},
    ),
    _sign_entry(
        sign.ApproxSign,
        "x",
        "largest where the sign changes",
        "arXiv:1808.00278",
        _approx_sign,
        examples={"alone": _layer()},
    ),
    _sign_entry(
        sign.SwishSign,
        "x",
        "smooth; finite at any x",
        "arXiv:1812.11800",
        _swish_sign,
        examples={"alone": _layer(), "steep": _layer(20.0)},
    ),
    _sign_entry(
        heaviside.SteHeaviside,
        _MASK,
        "0 or 1",
        "arXiv:1602.02830",
        examples={"bound": _layer(), "no bound": _layer(None)},
    ),
    _sign_entry(
        ternary_step.SteTern,
        _MASK,
        "-1, 0 or 1",
        "arXiv:1605.04711",
        examples={"number": _layer(0.5), "twn": _layer("twn", None)},
        curves={"": Curve(ternary_step.SteTern(0.5))},
    ),
    _sign_entry(
        scaled_sign.MagnitudeAwareSign,
        "a mask and the scales",
        "binary weights of their channel's size",
        "arXiv:1808.00278",
        _magnitude_aware,
        examples=_WEIGHTS,
        curves={"": _beside_ones(scaled_sign.MagnitudeAwareSign())},
    ),
    _sign_entry(
        scaled_sign.XNORSign,
        "a mask and the scales",
        "binary weights of their channel's size",
        "arXiv:1603.05279",
        _xnor,
        examples=_WEIGHTS,
        curves={"": _beside_ones(scaled_sign.XNORSign())},
    ),
)

ENTRIES = (*_ROUNDING, *_SIGNS)
