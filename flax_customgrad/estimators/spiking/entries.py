"""The catalogue's entries of the spiking family.

The formula of a surrogate differentiates the soft function whose derivative it is. The formula of a
cell differentiates its step, with that soft function in place of the spike.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_customgrad.estimators.spiking import leaky, lif
from flax_customgrad.estimators.spiking import spike_surrogates as surrogate
from flax_customgrad.estimators.spiking.fire import fire
from flax_customgrad.estimators.spiking.leak import leak
from flax_customgrad.registry.entry import Curve, Entry, Example
from flax_customgrad.registry.examples import applied, normal


def _few() -> jax.Array:
    return 0.5 * normal(8, 3)


def _many() -> jax.Array:
    return normal(4096, 1024)


# The soft function of (u, slope) whose derivative each surrogate is, and its rise from -inf to inf.

Soft = Callable[[jax.Array, Any], jax.Array]


def _fast_sigmoid(u: jax.Array, k: Any) -> jax.Array:
    return u / (1 + k * jnp.abs(u))


def _atan(u: jax.Array, k: Any) -> jax.Array:
    return jnp.arctan(jnp.pi * k * u / 2) / jnp.pi


def _sigmoid(u: jax.Array, k: Any) -> jax.Array:
    return jax.nn.sigmoid(k * u)


def _triangular(u: jax.Array, k: Any) -> jax.Array:
    return jnp.where(k * jnp.abs(u) < 1, u - k * u * jnp.abs(u) / 2, 0)


def _boxcar(u: jax.Array, k: Any) -> jax.Array:
    return jnp.where(k * jnp.abs(u) <= 1, u, 0)


def _exponential(u: jax.Array, k: Any) -> jax.Array:
    return jnp.where(u > 0, -jnp.exp(-k * u), jnp.exp(k * u)) / k


_SOFT_AND_RISE: Mapping[Any, tuple[Soft, Callable[[Any], Any]]] = {
    surrogate.fast_sigmoid: (_fast_sigmoid, lambda k: 2 / k),
    surrogate.atan: (_atan, lambda k: 1),
    surrogate.sigmoid: (_sigmoid, lambda k: 1),
    surrogate.triangular: (_triangular, lambda k: 1 / k),
    surrogate.boxcar: (_boxcar, lambda k: 2 / k),
    surrogate.piecewise_exponential: (_exponential, lambda k: 2 / k),
}


def _surrogate(
    function: Callable[..., jax.Array],
    slope: float,
    gain: str,
    source: str,
    *,
    keeps: str = "u, slope",
) -> Entry:
    """The entry of a surrogate.

    Args:
        function: the surrogate.
        slope: its default slope.
        gain: its properties in a few words.
        source: its paper.
        keeps: what its backward keeps.
    """
    soft, rise = _SOFT_AND_RISE[function]
    examples = {
        "alone": applied(_few),
        "normalized": applied(_few, slope=3.0, normalize=True),
    }
    if function in (surrogate.fast_sigmoid, surrogate.boxcar):
        examples["slope of each neuron"] = applied(_few, slope=np.array([1.5, 2.0, 5.0]))

    def formula(
        u: jax.Array, g: jax.Array, slope: Any = slope, normalize: bool = False
    ) -> tuple[jax.Array]:
        (du,) = jax.vjp(lambda u: soft(u, slope), u)[1](g)
        return (du / rise(slope) if normalize else du,)

    return Entry(
        f"surrogate.{function.__name__}",
        "spiking",
        function,
        None,
        "surrogate",
        keeps,
        gain,
        source,
        formula,
        {"": Curve(function), "normalized": Curve(partial(function, slope=2.0, normalize=True))},
        examples=examples,
        workloads={"4096x1024": applied(_many)},
    )


_SURROGATES = (
    _surrogate(
        surrogate.fast_sigmoid, 25.0, "falls off as 1 / u^2; SuperSpike", "arXiv:1705.11146"
    ),
    _surrogate(surrogate.atan, 2.0, "falls off as 1 / u^2; a density", "arXiv:2007.05785"),
    _surrogate(surrogate.sigmoid, 4.0, "finite at any u; a density", "arXiv:1706.02609"),
    _surrogate(surrogate.triangular, 1.0, "0 beyond 1 / k", "arXiv:1603.08270"),
    _surrogate(
        surrogate.boxcar,
        1.0,
        "passes within 1 / k, 0 beyond",
        "arXiv:1602.02830",
        keeps="a mask",
    ),
    _surrogate(surrogate.piecewise_exponential, 1.0, "falls off as exp(-k u)", "arXiv:1810.08646"),
)


# The cells


def _spike(cell: Any, z: jax.Array) -> jax.Array:
    """A spike with the derivative of the soft function of its surrogate."""
    slopes = {surrogate.fast_sigmoid: 25.0, surrogate.atan: 2.0}
    function = getattr(cell.spike, "func", cell.spike)
    slope = getattr(cell.spike, "keywords", {}).get("slope", slopes.get(function))
    soft = _SOFT_AND_RISE[function][0](z, slope)
    return soft + lax.stop_gradient((z > 0) - soft)


def _fired(cell: Any, theta: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    s = _spike(cell, v - theta)
    r = s if cell.reset_gradient else lax.stop_gradient(s)
    after = {"subtract": v - theta * r, "zero": v * (1 - r), "none": v}
    return after[cell.reset], s


def _leaked(decay: jax.Array, u: jax.Array, x: jax.Array) -> jax.Array:
    return (decay + lax.stop_gradient(jnp.clip(decay, 0, 1) - decay)) * u + x


def _of_cell(cell: Any, step: Callable[..., Any], *arrays: Any, g: Any) -> tuple[Any, ...]:
    """The gradient of a step, which is a function of the cell's Variables by name and of arrays."""
    variables = nnx.to_pure_dict(nnx.state(cell))
    of_variables, *of_arrays = jax.vjp(step, variables, *arrays)[1](g)
    trained = nnx.to_pure_dict(nnx.state(cell, nnx.Param))
    return nnx.State({name: of_variables[name] for name in trained}), *of_arrays


def _leaky(cell: Any, u: jax.Array, x: jax.Array, g: Any) -> tuple[Any, ...]:
    def step(p: Mapping[str, jax.Array], u: jax.Array, x: jax.Array) -> Any:
        return _fired(cell, p["threshold"], _leaked(p["decay"], u, x))

    return _of_cell(cell, step, u, x, g=g)


def _lif(cell: Any, i: jax.Array, u: jax.Array, x: jax.Array, g: Any) -> tuple[Any, ...]:
    def step(p: Mapping[str, jax.Array], i: jax.Array, u: jax.Array, x: jax.Array) -> Any:
        i = _leaked(p["current_decay"], i, x)
        u, s = _fired(cell, p["threshold"], _leaked(p["membrane_decay"], u, i))
        return (i, u), s

    return _of_cell(cell, step, i, u, x, g=g)


def _step_of_leaky(cell: Any, u: jax.Array, x: jax.Array) -> Any:
    return cell(u, x)


def _step_of_lif(cell: Any, i: jax.Array, u: jax.Array, x: jax.Array) -> Any:
    return cell((i, u), x)


def _over_time(cell: Any, x: jax.Array) -> jax.Array:
    return lax.scan(cell, cell.initialize_carry(x.shape[1:]), x)[1]


_STATES = (lambda: normal(8, 4), lambda: 0.6 + 0.7 * normal(8, 4)[::-1], lambda: normal(8, 4) / 2)


def _cell(step: Callable[..., Any], states: int, **neurons: Any) -> Example:
    inputs = _STATES[-states - 1 :]
    return lambda cls: (step, cls(4, **neurons), *(make() for make in inputs))


_FOUR = np.array([0.3, 0.5, 0.7, 0.9])
_LEARNED: dict[str, Any] = {"learn_decay": True, "learn_threshold": True}
_leaky_cell = partial(_cell, _step_of_leaky, 1, spike=surrogate.atan)
_lif_cell = partial(_cell, _step_of_lif, 2, spike=surrogate.atan)


def _grid_of_neurons(cls: Any) -> tuple[Any, ...]:
    """Decays and thresholds each shared along an axis, and one neuron exactly at its threshold."""
    cell = cls(
        (2, 3),
        decay=np.array([0.25, 0.5, 0.75]),
        threshold=np.array([[0.5], [1.0]]),
        spike=surrogate.atan,
        reset_gradient=True,
        **_LEARNED,
    )
    u, x = 0.6 + 0.7 * normal(8, 2, 3)[::-1], normal(8, 2, 3) / 2
    return _step_of_leaky, cell, u.at[0, 0, 1].set(0.5), x.at[0, 0, 1].set(0.25)


_CELLS = (
    Entry(
        "Leaky",
        "spiking",
        leaky.Leaky,
        None,
        "surrogate",
        keeps="the membrane; with a learned decay the one before the step, too",
        gain="composed of a leak and a fire: 1 array a step, or 2, where autodiff keeps 1 to 4",
        source="arXiv:1901.09948",
        formula=_leaky,
        examples={
            "learned": _leaky_cell(**_LEARNED),
            "reset to zero": _leaky_cell(reset="zero", learn_threshold=True),
            "no reset": _leaky_cell(reset="none"),
            "through the reset": _leaky_cell(reset_gradient=True, **_LEARNED),
            "through the reset to zero": _leaky_cell(reset="zero", reset_gradient=True),
            "two axes of neurons, through the reset": _grid_of_neurons,
        },
        workloads={
            "25 steps of 256x1024": lambda cls: (_over_time, cls(1024), normal(25, 256, 1024))
        },
        operations={
            leak: "two axes of neurons, through the reset",
            fire: "two axes of neurons, through the reset",
        },
    ),
    Entry(
        "LIF",
        "spiking",
        lif.LIF,
        None,
        "surrogate",
        keeps="the membrane; with learned decays both states before the step, too",
        gain="composed of leaks and a fire: 1 array a step, or 3, where autodiff keeps 1 to 5",
        source="arXiv:1901.09948",
        formula=_lif,
        examples={
            "learned": _lif_cell(**_LEARNED),
            "each neuron": _lif_cell(tau_syn=5 * _FOUR, tau_mem=10 * _FOUR, **_LEARNED),
            "slope": _lif_cell(spike=partial(surrogate.fast_sigmoid, slope=3.0), reset="zero"),
        },
        workloads={
            "25 steps of 256x1024": lambda cls: (_over_time, cls(1024), normal(25, 256, 1024))
        },
    ),
)

ENTRIES = (*_SURROGATES, *_CELLS)
