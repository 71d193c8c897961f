"""DirectFeedback: its formula, state that layers write, shapes, and what it says of bad ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


def test_images_and_integers():
    """A chain of an embedding, a convolution over time, and a linear map of what is flattened."""
    rngs = nnx.Rngs(0)
    flat = lambda h: h.reshape(len(h), -1)  # noqa: E731
    model = fcg.DirectFeedback(
        nnx.Embed(7, 3, rngs=rngs),
        nnx.Sequential(fcg.Conv(3, 2, 3, rngs=rngs), nnx.relu),
        nnx.Sequential(flat, nnx.Linear(10, 4, rngs=rngs)),
        features=((5, 3), (5, 2), 4),
        rngs=rngs,
    )
    assert [b.shape for b in model.feedback] == [(4, 5, 3), (4, 5, 2)]
    ids = np.arange(10).reshape(2, 5) % 7
    g = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)

    @nnx.jit
    def gradients(model, ids, g):
        grads = nnx.grad(lambda m: jnp.vdot(m(ids), g))(model)
        h1 = model.layers[0](ids)
        h2 = model.layers[1](h1)
        e1, e2 = (jnp.einsum("no,oth->nth", g, b[...]) for b in model.feedback)
        of_layers = [
            nnx.grad(lambda m, x=x, e=e: jnp.vdot(m(x), e))(model.layers[i])
            for i, (x, e) in enumerate([(ids, e1), (h1, e2), (h2, g)])
        ]
        return grads, of_layers

    grads, of_layers = gradients(model, ids, g)
    for i, of_layer in enumerate(of_layers):
        got, expected = map(jax.tree.leaves, (grads["layers"][i], of_layer))
        assert len(got) == len(expected) > 0
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
def test_one_layer_has_its_own_gradient():
    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model, x = fcg.DirectFeedback(linear, rngs=nnx.Rngs(1)), np.ones((4, 3), np.float32)
    assert len(model.feedback) == 0
    gradient = nnx.grad(lambda m, x: jnp.sum(m(x) ** 2), argnums=(0, 1))
    got, expected = (nnx.jit(gradient)(m, x) for m in (model, linear))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_state_is_written_once_and_the_backward_sees_what_the_forward_saw(transform):
    """Statistics of the batch, and dropout from one stream that all layers share."""
    rngs = nnx.Rngs(0)
    stream = nnx.Rngs(1).dropout

    def block(a, b):
        dropout = nnx.Dropout(0.5, rngs=stream)
        dropout.rngs = stream
        return nnx.Sequential(
            nnx.Linear(a, b, rngs=rngs), nnx.BatchNorm(b, momentum=0.5, rngs=rngs), dropout
        )

    model = fcg.DirectFeedback(block(3, 16), block(16, 16), rngs=rngs)
    plain, x = nnx.clone(model), jax.random.normal(jax.random.key(0), (6, 3))
    drawn = int(stream.count[...])
    h, y = nnx.jit(lambda m, x: (h := m.layers[0](x), m.layers[1](h)))(plain, x)

    def loss(model):
        y = model(x)
        return jnp.sum(y), y

    grads, got = transform(nnx.grad(loss, has_aux=True))(model)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)
    states = (nnx.state(m, (nnx.BatchStat, nnx.RngCount)) for m in (model, plain))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert stream.count[...] == drawn + 2
    # What a batch norm adds reaches the output, doubled, where the feature was not dropped.
    errors = [jnp.ones((6, 16)) @ model.feedback[0][...], jnp.ones((6, 16))]
    for layer, output, error in zip(grads.layers.values(), (h, y), errors, strict=True):
        expected = (2 * error * (output != 0)).sum(0)
        np.testing.assert_allclose(layer.layers[1].bias[...], expected, rtol=1e-4, atol=1e-4)


def test_half_precision():
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(4, 4, dtype=jnp.bfloat16, rngs=rngs) for _ in range(3)]
    model = fcg.DirectFeedback(*layers, param_dtype=jnp.bfloat16, rngs=rngs)
    assert model.feedback[0].dtype == jnp.bfloat16
    grads = nnx.jit(nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4))).astype(jnp.float32))))(model)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(grads))


def test_a_function_may_be_a_layer():
    rngs = nnx.Rngs(0)
    model = fcg.DirectFeedback(
        nnx.Linear(3, 4, rngs=rngs),
        nnx.relu,
        nnx.Linear(4, 2, rngs=rngs),
        features=(4, 4, 2),
        rngs=rngs,
    )
    grads = nnx.jit(nnx.grad(lambda m: jnp.sum(m(jnp.ones((5, 3))))))(model)
    expected = 5 * model.feedback[0].sum(axis=0)
    np.testing.assert_allclose(grads.layers[0].bias[...], expected, rtol=1e-5)


def test_features_are_known_from_the_layers():
    rngs = nnx.Rngs(0)
    model = fcg.DirectFeedback(
        nnx.LinearGeneral(3, (2, 4), rngs=rngs),
        nnx.Sequential(nnx.LinearGeneral((2, 4), 5, axis=(-2, -1), rngs=rngs), nnx.relu),
        nnx.Sequential(nnx.Sequential(nnx.Linear(5, 2, rngs=rngs), nnx.relu), nnx.relu),
        rngs=rngs,
    )
    assert model.features == ((2, 4), (5,), (2,))
    x = jax.ShapeDtypeStruct((2, 3, 3), jnp.float32)  # two batch axes
    value_and_gradient = nnx.grad(lambda x: (jnp.sum(y := model(x)), y), has_aux=True)
    gradient, y = jax.eval_shape(value_and_gradient, x)
    assert (y.shape, gradient.shape) == ((2, 3, 2), x.shape)


def test_bad_arguments():
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(3, 3, rngs=rngs)
    make = lambda *layers, **kwargs: fcg.DirectFeedback(*layers, **kwargs, rngs=rngs)  # noqa: E731
    with pytest.raises(ValueError, match="DirectFeedback: no layer was given"):
        make()
    with pytest.raises(TypeError, match="DirectFeedback: layer 1 is a int, not callable"):
        make(linear, 3)
    with pytest.raises(ValueError, match="DirectFeedback: layer 1 comes twice"):
        make(linear, linear)
    with pytest.raises(ValueError, match=r"layer 1, tanh, has no out_features: write features="):
        make(linear, jnp.tanh)
    with pytest.raises(ValueError, match=r"features=\(3,\) are 1, and there are 2 layers"):
        make(linear, nnx.Linear(3, 2, rngs=rngs), features=(3,))
    model = make(nnx.Conv(3, 4, 3, rngs=rngs), lambda h: h.sum((1, 2)), features=(4, ()))
    with pytest.raises(
        ValueError, match=r"layer 0 puts out \(2, 5, 4\), and features=\(4,\) after the"
    ):
        model(jnp.ones((2, 5, 3)))
