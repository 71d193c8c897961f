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


def first_kernel(model):
    return model.layers[0].layers[0].kernel[...]


def trained(model, steps=50, rate=0.3):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params, _):
        grads = jax.grad(lambda params: loss(nnx.merge(graphdef, params, rest)))(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), None

    params, _ = jax.jit(lambda params: jax.lax.scan(step, params, length=steps))(params)
    return nnx.merge(graphdef, params, rest)


def cosine(model):
    """Of the angle between the gradient by feedback and the true one, of the first kernel."""
    ours, true = (first_kernel(nnx.grad(f)(model)).ravel() for f in (loss, true_loss))
    return float(ours @ true / jnp.linalg.norm(ours) / jnp.linalg.norm(true))


@pytest.mark.parametrize("make", [feedback_layers, direct])
def test_feedback_aligns_and_teaches_the_hidden_layers(make):
    model, control = make(), make(feedback_init=nnx.initializers.zeros)
    assert np.isclose(loss(model), true_loss(model), rtol=1e-5)
    assert cosine(model) < 0
    learned, without = trained(model), trained(control)
    assert cosine(learned) > 0.3
    assert loss(learned) < 0.3 * loss(without)
    # With no feedback the first layer has no gradient, and stays as it was.
    np.testing.assert_array_equal(first_kernel(without), first_kernel(control))
