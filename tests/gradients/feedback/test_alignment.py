"""Layers learn to make use of random feedback: what it sends back aligns with the true error.

A regression with two hidden layers by plain gradient descent, from small weights, as in the papers:
the weights that align are those that are learned.
"""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

SMALL = nnx.initializers.normal(0.1)
WIDTHS = (10, 32, 32, 4)
X = jax.random.normal(jax.random.key(0), (64, WIDTHS[0]))
Y = jnp.tanh(X @ jax.random.normal(jax.random.key(1), (WIDTHS[0], WIDTHS[-1])) / 2)


def blocks(linear, rngs):
    *hidden, last = pairwise(WIDTHS)
    return [
        *(nnx.Sequential(linear(*w, rngs=rngs), nnx.tanh) for w in hidden),
        linear(*last, rngs=rngs),
    ]


def feedback_layers(**kwargs):
    linear = partial(fcg.FeedbackLinear, kernel_init=SMALL, **kwargs)
    return nnx.Sequential(*blocks(linear, nnx.Rngs(0)))


def direct(**kwargs):
    rngs = nnx.Rngs(0)
    return fcg.DirectFeedback(
        *blocks(partial(nnx.Linear, kernel_init=SMALL), rngs), **kwargs, rngs=rngs
    )


def loss(model):
    return jnp.mean((model(X) - Y) ** 2)


def true_loss(model):
    """The same loss of the same parameters, differentiated by JAX."""
    h = X
    for layer in model.layers:
        parts = layer.layers if isinstance(layer, nnx.Sequential) else [layer]
        for part in parts:
            h = nnx.Linear.__call__(part, h) if isinstance(part, nnx.Linear) else part(h)
    return jnp.mean((h - Y) ** 2)


def first_kernel(params):
    return params["layers"][0]["layers"][0]["kernel"][...]


@partial(jax.jit, static_argnums=0)
def training(graphdef, params, rest):
    """What there is to see of a model in 50 steps, each time before a step.

    The losses, the cosine of the angle between the gradient by feedback and the true one, of the
    first kernel, and that kernel.
    """

    def step(params, _):
        (ours, grads), (true, true_grads) = (
            jax.value_and_grad(lambda p, f=f: f(nnx.merge(graphdef, p, rest)))(params)
            for f in (loss, true_loss)
        )
        a, b = (first_kernel(g).ravel() for g in (grads, true_grads))
        cosine = a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)
        stepped = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
        return stepped, (ours, true, cosine, first_kernel(params))

    return jax.lax.scan(step, params, length=51)[1]


@pytest.mark.parametrize("make", [feedback_layers, direct])
def test_feedback_aligns_and_teaches_the_hidden_layers(make):
    models = make(), make(feedback_init=nnx.initializers.zeros)
    of_feedback, of_none = (training(*nnx.split(m, nnx.Param, ...)) for m in models)
    losses, true_losses, cosines, _ = of_feedback
    np.testing.assert_allclose(losses, true_losses, rtol=1e-5)
    assert cosines[0] < 0
    assert cosines[-1] > 0.3
    assert losses[-1] < 0.3 * of_none[0][-1]
    # With no feedback the first layer has no gradient, and stays as it was.
    kernels = of_none[3]
    np.testing.assert_array_equal(kernels[0], kernels[-1])
