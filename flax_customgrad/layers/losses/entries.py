"""The catalogue's entries of the losses.

Memory is that of value and gradient for 2048 rows of 512 features and 32000 classes, float32: with
optax -> with this library.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_customgrad.layers.losses.chunked_cross_entropy import summed_cross_entropy
from flax_customgrad.layers.losses.ctc import ctc
from flax_customgrad.layers.losses.ctc_loss import ctc_loss
from flax_customgrad.layers.losses.integer_labels import cross_entropy_of_labels
from flax_customgrad.layers.losses.linear_cross_entropy import linear_cross_entropy
from flax_customgrad.layers.losses.sigmoid_binary_cross_entropy import sigmoid_binary_cross_entropy
from flax_customgrad.layers.losses.soft_labels import cross_entropy_of_distributions
from flax_customgrad.layers.losses.softmax_cross_entropy import (
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from flax_customgrad.registry.entry import Entry
from flax_customgrad.registry.examples import applied, normal


def _few() -> jax.Array:
    return 2 * normal(8, 3, 5)


def _labels() -> jax.Array:
    """Classes from 0 to 4, and now and then -1."""
    return jnp.arange(24).reshape(8, 3) * 7 % 6 - 1


def _distributions() -> jax.Array:
    return jax.nn.softmax(normal(8, 5, 3).reshape(8, 3, 5))


def _mask() -> jax.Array:
    """Classes that count: all, some, or in one row none."""
    return (jnp.arange(120).reshape(8, 3, 5) % 4 > 0).at[1, 2].set(False)


def _many() -> jax.Array:
    return normal(2048, 32000)


def _many_labels() -> jax.Array:
    return jnp.arange(2048) * 997 % 32000


_ALL_TERMS = {"label_smoothing": 0.1, "z_loss": 0.1}
_KEEPS = "logits and labels; the maximum and the sum of each row"
_GAIN = (
    "float32 losses from half precision; no NaN at minus infinity; one array of the logits' size"
)


def _output_layer(**kwargs: Any) -> Any:
    """An example with a bias and with weights, each of which has a gradient."""

    def make(function: Any) -> tuple[Any, ...]:
        def loss(
            hidden: jax.Array, kernel: jax.Array, labels: jax.Array, b: jax.Array, w: jax.Array
        ) -> jax.Array:
            return function(hidden, kernel, labels, bias=b, weights=w, **kwargs)

        weights = 0.1 + normal(8, 3) ** 2
        return loss, normal(8, 3, 4), normal(4, 5), _labels(), normal(5), weights

    return make


_WIDE = {
    "2048x512 to 32000": applied(
        lambda: normal(2048, 512), lambda: normal(512, 32000) / 23, _many_labels
    ),
    "2048x512 to 32000, bf16": applied(
        lambda: normal(2048, 512, dtype=jnp.bfloat16),
        lambda: normal(512, 32000, dtype=jnp.bfloat16) / 23,
        _many_labels,
    ),
}


def _ctc(batch: int, frames: int, classes: int, n: int) -> Any:
    """An example of sequences of different lengths, with repeated labels."""

    def make(function: Any) -> tuple[Any, ...]:
        rng = np.random.default_rng(0)
        length = rng.integers(n // 2, n + 1, (batch, 1))
        is_padded = np.arange(n) >= length
        is_padded_frame = np.arange(frames) >= rng.integers(2 * n, frames + 1, (batch, 1))
        labels = rng.integers(0, classes - 1, (batch, n))

        def loss(
            logits: jax.Array, paddings: jax.Array, labels: jax.Array, label_paddings: jax.Array
        ) -> jax.Array:
            return function(logits, paddings, labels, label_paddings, blank_id=classes - 1)

        return loss, normal(batch, frames, classes), is_padded_frame, labels, is_padded

    return make


ENTRIES = (
    Entry(
        "softmax_cross_entropy",
        "losses",
        softmax_cross_entropy,
        None,
        "exact",
        keeps=_KEEPS,
        gain=_GAIN,
        examples={
            "integers, all terms": applied(_few, _labels, -1, _mask, ignore_index=-1, **_ALL_TERMS),
            "distributions, all terms": applied(_few, _distributions, -1, _mask, **_ALL_TERMS),
            "distributions over two axes": applied(lambda: 2 * _few(), _distributions, (0, -1)),
        },
        operations={
            cross_entropy_of_labels: "integers, all terms",
            cross_entropy_of_distributions: "distributions, all terms",
        },
        workloads={
            "2048x32000": applied(_many, _many_labels),
            "2048x32000, bf16": applied(
                lambda: normal(2048, 32000, dtype=jnp.bfloat16), _many_labels
            ),
            "2048x32000, distributions": applied(_many, lambda: jax.nn.softmax(_many() / 2)),
        },
    ),
    Entry(
        "softmax_cross_entropy_with_integer_labels",
        "losses",
        softmax_cross_entropy_with_integer_labels,
        None,
        "exact",
        keeps=_KEEPS,
        gain=_GAIN,
        examples={"axis in the middle": applied(_few, lambda: jnp.arange(40).reshape(8, 5) % 3, 1)},
        workloads={"2048x32000": applied(_many, _many_labels)},
    ),
    Entry(
        "sigmoid_binary_cross_entropy",
        "losses",
        sigmoid_binary_cross_entropy,
        None,
        "exact",
        keeps="logits and labels",
        gain="float32 losses from half precision; finite at infinity; autodiff keeps 10 arrays",
        examples={"labels repeated": applied(_few, lambda: _distributions()[:, :1])},
        workloads={
            "4096x1024": applied(lambda: normal(4096, 1024), lambda: normal(4096, 1024) > 0)
        },
    ),
    Entry(
        "linear_cross_entropy",
        "losses",
        linear_cross_entropy,
        None,
        "exact",
        keeps='its gradients; for "none" only hidden and kernel',
        gain="no array of the logits: 524 MB -> 107",
        source="arXiv:2411.09009",
        examples={
            "mean, all terms, several chunks": _output_layer(
                softcap=2.0, ignore_index=-1, chunk_rows=5, **_ALL_TERMS
            ),
            "none": _output_layer(reduction="none", ignore_index=-1, chunk_rows=5),
        },
        operations={summed_cross_entropy: "mean, all terms, several chunks"},
        workloads=_WIDE,
    ),
    Entry(
        "ctc_loss",
        "losses",
        ctc_loss,
        None,
        "exact",
        keeps="logits; two numbers a frame and label",
        gain="half of the memory; over 1000 frames a float32 gradient off by 1e-5, optax's by 5e-3",
        source="https://www.cs.toronto.edu/~graves/icml_2006.pdf",
        examples={"repeats, paddings": _ctc(8, 9, 5, 3)},
        operations={ctc: "repeats, paddings"},
        workloads={"16x400 frames of 128 classes, 60 labels": _ctc(16, 400, 128, 60)},
    ),
)
