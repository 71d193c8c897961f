"""The catalogue's entries of feedback alignment."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_customgrad.gradients.feedback.direct_feedback import DirectFeedback
from flax_customgrad.gradients.feedback.feedback_conv import FeedbackConv
from flax_customgrad.gradients.feedback.feedback_linear import FeedbackLinear
from flax_customgrad.registry.entry import Entry, Example
from flax_customgrad.registry.examples import made, normal


def _with_feedback(cls: Any) -> Callable[..., tuple[Any, ...]]:
    """JAX's gradient of a layer of flax.nnx; for its input, of one whose kernel is the feedback."""

    def formula(layer: Any, x: jax.Array, g: jax.Array) -> tuple[Any, ...]:
        graphdef, params, rest = nnx.split(layer, nnx.Param, ..., graph=True)

        def call(params: nnx.State, x: jax.Array) -> jax.Array:
            return cls.__call__(nnx.merge(graphdef, params, rest), x)

        random = nnx.State({**params, "kernel": nnx.Param(layer.feedback[...])})
        (dparams,) = jax.vjp(lambda params: call(params, x), params)[1](g)
        (dx,) = jax.vjp(lambda x: call(random, x), x)[1](g)
        return dparams, dx

    return formula


def _tanh_layers(*widths: int, inputs: Callable[[], jax.Array]) -> Example:
    """A chain of linear layers, each with a tanh."""

    def make(cls: Any) -> tuple[Any, ...]:
        rngs = nnx.Rngs(0)
        layers = [
            nnx.Sequential(nnx.Linear(a, b, rngs=rngs), nnx.tanh) for a, b in pairwise(widths)
        ]
        return cls(*layers, rngs=rngs), inputs()

    return make


def _direct(model: Any, x: jax.Array, g: jax.Array) -> tuple[nnx.State, jax.Array]:
    """What `_tanh_layers` get, written out."""
    errors = [*(g @ feedback[...] for feedback in model.feedback), g]
    linears = [layer.layers[0] for layer in model.layers]
    dlayers, backs = {}, []
    for i, (linear, error) in enumerate(zip(linears, errors, strict=True)):
        y = jnp.tanh(x @ linear.kernel[...] + linear.bias[...])
        delta = error * (1 - y**2)
        dlayers[i] = {"layers": {0: {"kernel": x.T @ delta, "bias": delta.sum(0)}}}
        backs.append(delta @ linear.kernel[...].T)
        x = y
    return nnx.State({"layers": dlayers}), backs[0]


def _images(*args: Any, shape: tuple[int, ...], **kwargs: Any) -> Example:
    return made(shape[-1], *args, **kwargs, inputs=(lambda: normal(*shape),))


ENTRIES = (
    Entry(
        "FeedbackLinear",
        "feedback",
        FeedbackLinear,
        None,
        "surrogate",
        keeps="x, kernel, feedback",
        gain="learning without the transposed weights, as a brain or a chip may have to",
        source="arXiv:1411.0247",
        formula=_with_feedback(nnx.Linear),
        examples={
            "bias": made(6, 4, inputs=(lambda: normal(8, 6),)),
            "no bias, two batch axes": made(
                6, 4, use_bias=False, inputs=(lambda: normal(8, 3, 6),)
            ),
        },
        workloads={"4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),))},
    ),
    Entry(
        "FeedbackConv",
        "feedback",
        FeedbackConv,
        None,
        "surrogate",
        keeps="x without its padding, kernel, feedback",
        gain="learning without the transposed weights, as a brain or a chip may have to",
        source="arXiv:1411.0247",
        formula=_with_feedback(nnx.Conv),
        examples={
            "dense, reflected": _images(3, (2, 3), padding="REFLECT", shape=(8, 3, 4, 2)),
            "depthwise": _images(4, 3, padding="CAUSAL", feature_group_count=2, shape=(8, 5, 2)),
            "strided, dilated, circular": _images(
                4, 2, 2, kernel_dilation=2, padding="CIRCULAR", use_bias=False, shape=(8, 5, 3)
            ),
        },
        workloads={"3x3, 16x32x32x128": _images(128, (3, 3), shape=(16, 32, 32, 128))},
    ),
    Entry(
        "DirectFeedback",
        "feedback",
        DirectFeedback,
        None,
        "surrogate",
        keeps="x, parameters, feedback",
        gain="learning without a backward chain: every layer's error straight from the output's",
        source="arXiv:1609.01596",
        formula=_direct,
        examples={"three layers": _tanh_layers(6, 5, 7, 3, inputs=lambda: normal(8, 6))},
        workloads={
            "4 layers of 1024, batch 1024": _tanh_layers(
                1024, 1024, 1024, 1024, 1024, inputs=lambda: normal(1024, 1024)
            )
        },
    ),
)
