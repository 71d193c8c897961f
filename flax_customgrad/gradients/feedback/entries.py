"""The catalogue's entries of feedback alignment."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_customgrad.gradients.feedback.alignment import apply_with_feedback
from flax_customgrad.gradients.feedback.direct_feedback import DirectFeedback, chain
from flax_customgrad.gradients.feedback.feedback_conv import FeedbackConv
from flax_customgrad.gradients.feedback.feedback_linear import FeedbackLinear
from flax_customgrad.layers.linear.linear import Linear
from flax_customgrad.registry.entry import Entry, Example
from flax_customgrad.registry.examples import RANDOM_BIAS, made, normal


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


def _tanh_layers(
    *widths: int, inputs: Callable[[], jax.Array], without_bias: int | None = None
) -> Example:
    """A chain of linear layers, each with a tanh, one perhaps without a bias."""

    def make(cls: Any) -> tuple[Any, ...]:
        rngs = nnx.Rngs(0)
        layers = [
            nnx.Sequential(
                # Not nnx's, whose gradient XLA may sum over the rows in bfloat16.
                Linear(a, b, use_bias=i != without_bias, **RANDOM_BIAS, rngs=rngs),
                nnx.tanh,
            )
            for i, (a, b) in enumerate(pairwise(widths))
        ]
        return cls(*layers, rngs=rngs), inputs()

    return make


def _direct(model: Any, x: jax.Array, g: jax.Array) -> tuple[nnx.State, jax.Array]:
    """The gradient of `_tanh_layers`, written out."""
    errors = [*(g @ feedback[...] for feedback in model.feedback), g]
    linears = [layer.layers[0] for layer in model.layers]
    dlayers, dh = {}, []
    for i, (linear, e) in enumerate(zip(linears, errors, strict=True)):
        bias = 0 if linear.bias is None else linear.bias[...]
        y = jnp.tanh(x @ linear.kernel[...] + bias)
        delta = e * (1 - y**2)
        dlinear = {"kernel": jnp.einsum("...i,...o->io", x, delta)}
        if linear.bias is not None:
            dlinear["bias"] = jnp.einsum("...o->o", delta)
        dlayers[i] = {"layers": {0: dlinear}}
        dh.append(delta @ linear.kernel[...].T)
        x = y
    return nnx.State({"layers": dlayers}), dh[0]


def _images(*args: Any, shape: tuple[int, ...], **kwargs: Any) -> Example:
    return made(shape[-1], *args, **kwargs, inputs=(lambda: normal(*shape),))


# Leaves out every fifth weight of a kernel of 3, with 2 features in and 4 out.
_MASK = (np.arange(3 * 2 * 4) % 5 > 0).reshape(3, 2, 4).astype(np.float32)

ENTRIES = (
    Entry(
        "FeedbackLinear",
        "feedback",
        FeedbackLinear,
        None,
        "surrogate",
        keeps="x, kernel, feedback",
        gain="composed: learning without the transposed weights, as a brain or a chip may have to",
        source="arXiv:1411.0247",
        formula=_with_feedback(nnx.Linear),
        examples={
            "bias, two batch axes of which one is 1": made(
                6, 4, **RANDOM_BIAS, inputs=(lambda: normal(8, 1, 6),)
            ),
            "no bias, two batch axes": made(
                6, 4, use_bias=False, inputs=(lambda: normal(8, 3, 6),)
            ),
        },
        operations={apply_with_feedback: "bias, two batch axes of which one is 1"},
        workloads={"4096x1024 to 1024": made(1024, 1024, inputs=(lambda: normal(4096, 1024),))},
    ),
    Entry(
        "FeedbackConv",
        "feedback",
        FeedbackConv,
        None,
        "surrogate",
        keeps="x without its padding, kernel, feedback",
        gain="composed: learning without the transposed weights, as a brain or a chip may have to",
        source="arXiv:1411.0247",
        formula=_with_feedback(nnx.Conv),
        examples={
            "dense, strided, reflected": _images(
                3, (2, 3), 2, padding="REFLECT", **RANDOM_BIAS, shape=(8, 3, 5, 2)
            ),
            "depthwise": _images(4, 3, padding="CAUSAL", feature_group_count=2, shape=(8, 5, 2)),
            "input dilation, mask": _images(
                4, 3, input_dilation=2, padding=((1, 2),), mask=_MASK, shape=(8, 5, 2)
            ),
            "strided, dilated, circular": _images(
                4, 2, 2, kernel_dilation=2, padding="CIRCULAR", use_bias=False, shape=(8, 5, 3)
            ),
        },
        operations={apply_with_feedback: "dense, strided, reflected"},
        workloads={"3x3, 16x32x32x128": _images(128, (3, 3), shape=(16, 32, 32, 128))},
    ),
    Entry(
        "DirectFeedback",
        "feedback",
        DirectFeedback,
        None,
        "surrogate",
        keeps="x, parameters, feedback",
        gain="composed: each layer's error straight from the output's, without a backward chain",
        source="arXiv:1609.01596",
        formula=_direct,
        examples={
            "three layers, one without bias, two batch axes": _tanh_layers(
                6, 5, 1, 3, inputs=lambda: normal(8, 2, 6), without_bias=1
            ),
            "wide layers": _tanh_layers(6, 5, 4, inputs=lambda: normal(8, 6)),
        },
        operations={chain: "three layers, one without bias, two batch axes"},
        workloads={
            "4 layers of 1024, batch 1024": _tanh_layers(
                1024, 1024, 1024, 1024, 1024, inputs=lambda: normal(1024, 1024)
            )
        },
    ),
)
