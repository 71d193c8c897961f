"""Reversible: the gradients of autodiff, at a memory that does not grow with the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

X = jax.random.normal(jax.random.key(0), (3, 8))


def half(rngs, features=4, rate=0.0):
    layers = [nnx.LayerNorm(features, rngs=rngs), nnx.Linear(features, features, rngs=rngs)]
    return nnx.Sequential(*layers, nnx.tanh, nnx.Dropout(rate, rngs=rngs))


def stack(length, **kwargs):
    @nnx.split_rngs(splits=length)
    @nnx.vmap
    def halves(rngs):
        return half(rngs, **kwargs)

    return fcg.Reversible(halves(nnx.Rngs(0)), halves(nnx.Rngs(1)), length=length)


def blocks(**kwargs):
    rngs = nnx.Rngs(0)
    return fcg.Reversible(
        [half(rngs, **kwargs) for _ in range(2)], [half(rngs, **kwargs) for _ in range(2)]
    )


def loss(model, x):
    return jnp.sum(jnp.sin(model(x)))


def gradients(model, x=X):
    """Those of the parameters and of x, and the state after the call."""
    model = nnx.clone(model)
    of_model, of_x = nnx.grad(loss, argnums=(0, 1))(model, x)
    state = nnx.state(model, nnx.Not(nnx.Param))
    return jax.tree.map(lambda a: a, (of_model, of_x)), nnx.to_pure_dict(state)


def assert_close(a, b, **tolerances):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.leaves(a)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), a, b)


@pytest.mark.parametrize("make", [blocks, lambda **k: stack(5, **k)], ids=["list", "stacked"])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_gradients_are_those_of_autodiff(make, rate):
    model = make(rate=rate)
    ours, written = gradients(model)
    with fcg.use_autodiff():
        expected, written_by_autodiff = gradients(model)
    assert_close(ours, expected, atol=5e-5)
    keys = jax.tree.map(lambda a: jax.random.key_data(a) if a.dtype != jnp.uint32 else a, written)
    assert_close(
        keys,
        jax.tree.map(
            lambda a: jax.random.key_data(a) if a.dtype != jnp.uint32 else a, written_by_autodiff
        ),
    )


def test_one_stream_of_random_numbers_may_serve_every_function():
    class Noise(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs
            self.w = nnx.Param(jnp.ones(4))

        def __call__(self, x):
            return self.w * jnp.sin(x) * jax.random.normal(self.rngs.noise(), x.shape)

    rngs = nnx.Rngs(noise=0)
    model = fcg.Reversible([Noise(rngs), Noise(rngs)], [Noise(rngs), Noise(rngs)])
    ours, _ = gradients(model)
    with fcg.use_autodiff():
        expected, _ = gradients(model)
    assert_close(ours, expected, atol=1e-5)


def test_a_function_may_be_shared():
    rngs = nnx.Rngs(0)
    shared, other = half(rngs), half(rngs)
    model = fcg.Reversible([shared, other], [nnx.tanh, shared])
    ours, _ = gradients(model)
    with fcg.use_autodiff():
        expected, _ = gradients(model)
    assert_close(ours, expected, atol=5e-5)


def test_statistics_are_written_once():
    rngs = nnx.Rngs(0)
    model = fcg.Reversible(nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    ours, written = gradients(model)
    with fcg.use_autodiff():
        expected, of_autodiff = gradients(model)
    assert_close(ours, expected, atol=1e-5)
    assert_close(written, of_autodiff, rtol=1e-6)


@pytest.mark.parametrize("model", [blocks(), stack(3)], ids=["list", "stacked"])
def test_inverse(model):
    np.testing.assert_allclose(model.inverse(model(X)), X, atol=1e-6)


def test_24_blocks_take_the_memory_of_2():
    x = jnp.ones((256, 64))

    def temporary_bytes(length):
        model = stack(length, features=32)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        gradient = jax.jit(
            jax.grad(lambda p, rest, x: loss(nnx.merge(graphdef, p, rest, copy=True), x))
        )
        compiled = gradient.lower(params, rest, x).compile().memory_analysis()
        of_parameters = sum(a.nbytes for a in jax.tree.leaves(params))
        return compiled.temp_size_in_bytes - 2 * of_parameters

    few, many = temporary_bytes(2), temporary_bytes(24)
    assert many < 1.1 * few
    with fcg.use_autodiff():
        assert temporary_bytes(24) > 8 * many


def test_what_it_refuses():
    tanh = nnx.tanh
    with pytest.raises(ValueError, match="an even size"):
        fcg.Reversible(tanh, tanh)(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"maps \(2, 4\) to \(2, 1\)"):
        fcg.Reversible(lambda x: x[:, :1], tanh)(jnp.ones((2, 8)))
    with pytest.raises(TypeError, match="g is a int, not callable"):
        fcg.Reversible(tanh, 3)
    with pytest.raises(ValueError, match="got 2 in a sequence and one"):
        fcg.Reversible([tanh, tanh], tanh)
    with pytest.raises(ValueError, match=r"length=3, but .*bias has shape \(2,\)"):
        fcg.Reversible(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tanh, length=3)
    with pytest.raises(TypeError, match="got int32"):
        fcg.Reversible(tanh, tanh)(jnp.ones((2, 4), jnp.int32))
