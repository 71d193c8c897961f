"""The catalogue's entries of gradient shaping."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_customgrad.gradients.shaping import clip, reversal, scale, stop
from flax_customgrad.registry.entry import Curve, Entry, Example
from flax_customgrad.registry.examples import applied, normal


def _few() -> jax.Array:
    return 2 * normal(8, 3)


def _many() -> jax.Array:
    return normal(4096, 1024)


def _positive() -> jax.Array:
    return normal(4096, 1024) > 0


def _column() -> jax.Array:
    return 2 * normal(8, 1, 3)


def _clip_to(x: jax.Array, limit: jax.Array, *, by: str, batch_axes: Any = ()) -> jax.Array:
    """`gradient_clip` with its limit as an array beside x."""
    return clip.gradient_clip(x, batch_axes=batch_axes, **{by: limit})


def _half_of_step(step: Any) -> Any:
    return step / 2


def _layer(*args: Any, inputs: Callable[[], jax.Array] = _few, **kwargs: Any) -> Example:
    """An example of a Module that needs no random numbers."""
    return lambda cls: (cls(*args, **kwargs), inputs())


def _at_step(
    step: Any, *args: Any, inputs: Callable[[], jax.Array] = _few, **kwargs: Any
) -> Example:
    """An example of a Module that is called with a step."""
    return lambda cls: (lambda layer, x: layer(x, step), cls(*args, **kwargs), inputs())


def _clipped(g: jax.Array, max_value: Any, max_norm: Any, batch_axes: Any) -> jax.Array:
    if max_value is not None:
        return jnp.maximum(-max_value, jnp.minimum(g, max_value))
    axes = None if batch_axes == () else tuple(range(1, g.ndim))
    norm = jnp.sqrt(jnp.sum(g * g, axes, keepdims=True))
    return g * jnp.minimum(1, max_norm / norm)


def _clip_formula(
    x: jax.Array,
    *limit_and_g: jax.Array,
    by: str = "",
    max_value: Any = None,
    max_norm: Any = None,
    batch_axes: Any = (),
) -> tuple[Any, ...]:
    *limit, g = limit_and_g
    if limit:
        max_value, max_norm = (limit[0], None) if by == "max_value" else (None, limit[0])
    return _clipped(g, max_value, max_norm, batch_axes), *(None for _ in limit)


_CLIP_EXAMPLES: dict[str, dict[str, Any]] = {
    "by value": {"max_value": 0.3},
    "by norm": {"max_norm": 1.5},
    "by norm, each example": {"max_norm": 0.6, "batch_axes": 0},
}

ENTRIES = (
    Entry(
        "gradient_reversal",
        "shaping",
        reversal.gradient_reversal,
        None,
        "surrogate",
        keeps="strength",
        gain="features that a classifier cannot tell apart, in one gradient step",
        source="arXiv:1505.07818",
        formula=lambda x, strength, g: (-strength * g, None),
        examples={
            "number": applied(_few, 0.7),
            "array": applied(_few, lambda: jnp.array([0.5, 1.0, 2.0])),
        },
        curves={"strength 1": Curve(reversal.gradient_reversal)},
        workloads={"4096x1024": applied(_many, 0.7)},
    ),
    Entry(
        "GradientReversal",
        "shaping",
        reversal.GradientReversal,
        None,
        "surrogate",
        keeps="strength",
        gain="a strength that a schedule raises",
        source="arXiv:1505.07818",
        formula=lambda layer, x, g: (None, -1.5 * g),
        examples={"number": _layer(1.5), "schedule": _at_step(3, _half_of_step)},
        workloads={"4096x1024": _layer(1.5, inputs=_many)},
    ),
    Entry(
        "gradient_scale",
        "shaping",
        scale.gradient_scale,
        None,
        "surrogate",
        keeps="scale",
        gain="parts of a model that learn faster or slower, with one optimizer",
        formula=lambda x, scale, g: (scale * g, None),
        examples={
            "number": applied(_few, 0.3),
            "3-D, a scale for each feature": applied(_column, lambda: jnp.array([-0.5, 0.0, 2.0])),
        },
        operations={scale.scale_cotangent: "3-D, a scale for each feature"},
        curves={"0.3": Curve(lambda x: scale.gradient_scale(x, 0.3))},
        workloads={"4096x1024": applied(_many, 0.3)},
    ),
    Entry(
        "GradientScale",
        "shaping",
        scale.GradientScale,
        None,
        "surrogate",
        keeps="scale",
        gain="a scale that a schedule changes",
        formula=lambda layer, x, g: (None, 1.5 * g),
        examples={"number": _layer(1.5), "schedule": _at_step(3, _half_of_step)},
        workloads={"4096x1024": _layer(1.5, inputs=_many)},
    ),
    Entry(
        "gradient_clip",
        "shaping",
        clip.gradient_clip,
        None,
        "surrogate",
        keeps="the limit",
        gain="a bound on what passes through one place of a model, by value, norm or example",
        source="arXiv:1211.5063",
        formula=_clip_formula,
        curves={"1, before x^2 / 2": Curve(lambda x: clip.gradient_clip(x, max_value=1) ** 2 / 2)},
        examples={
            **{name: applied(_few, **limit) for name, limit in _CLIP_EXAMPLES.items()},
            "by value, 3-D, a limit for each feature": lambda _: (
                partial(_clip_to, by="max_value"),
                _column(),
                jnp.array([0.5, 0.8, jnp.inf]),
            ),
            "by norm, 3-D, each example, a traced limit": lambda _: (
                partial(_clip_to, by="max_norm", batch_axes=0),
                _column(),
                jnp.asarray(0.6),
            ),
        },
        operations={
            clip.clip_cotangent_by_value: "by value, 3-D, a limit for each feature",
            clip.clip_cotangent_by_norm: "by norm, 3-D, each example, a traced limit",
        },
        workloads={"4096x1024, by norm": applied(_many, max_norm=1.0)},
    ),
    Entry(
        "GradientClip",
        "shaping",
        clip.GradientClip,
        None,
        "surrogate",
        keeps="the limit",
        gain="a bound on what passes through one place of a model, by value, norm or example",
        source="arXiv:1211.5063",
        formula=lambda layer, x, g: (
            None,
            _clipped(g, layer.max_value, layer.max_norm, layer.batch_axes),
        ),
        examples={name: _layer(**limit) for name, limit in _CLIP_EXAMPLES.items()},
        workloads={"4096x1024, by norm": _layer(inputs=_many, max_norm=1.0)},
    ),
    Entry(
        "stop_gradient",
        "shaping",
        stop.stop_gradient,
        None,
        "surrogate",
        keeps="where",
        gain="a gradient stopped in places, or when a traced boolean says so",
        formula=lambda x, where, g: (jnp.where(where, 0, g), None),
        curves={"where x > 1": Curve(lambda x: stop.stop_gradient(x, x > 1))},
        examples={
            "in places": applied(_few, lambda: jnp.arange(24).reshape(8, 3) % 5 < 2),
            "3-D, features of some examples": applied(
                lambda: 2 * normal(8, 3, 2), lambda: jnp.arange(16).reshape(8, 1, 2) % 5 < 2
            ),
        },
        operations={stop.stop_cotangent: "3-D, features of some examples"},
        workloads={"4096x1024": applied(_many, _positive)},
    ),
    Entry(
        "StopGradient",
        "shaping",
        stop.StopGradient,
        None,
        "surrogate",
        keeps="a boolean",
        gain="truncated backpropagation through time in a scan, and warming up without a new step",
        formula=lambda layer, x, g: (None, jnp.where(jnp.array([1, 0, 1]), g, 0)),
        examples={"each its own step": _at_step(np.arange(3, dtype=np.int32), 1, 3, every=2)},
        workloads={"4096x1024": _at_step(5, stop=10, inputs=_many)},
    ),
)
