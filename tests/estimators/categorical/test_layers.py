"""The layers of the categorical family: keys, modes, temperatures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

LOGITS = jax.random.normal(jax.random.key(5), (50, 6))
MAKE = {
    "GumbelSoftmax": fcg.GumbelSoftmax,
    "soft": lambda *args, **kwargs: fcg.GumbelSoftmax(*args, hard=False, **kwargs),
    "ReinMax": fcg.ReinMax,
    "TopKST": lambda *args, **kwargs: fcg.TopKST(2, *args, sample=True, **kwargs),
}
by_name = pytest.mark.parametrize("name", MAKE)


@by_name
def test_each_call_takes_another_key(name):
    a, b = (MAKE[name](rngs=nnx.Rngs(0)) for _ in range(2))
    first, second = a(LOGITS), a(LOGITS)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(b(LOGITS), first)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(b, LOGITS), second)


@by_name
def test_without_noise_it_is_the_largest(name):
    expected = {
        "soft": jax.nn.softmax(LOGITS / 0.5),
        "TopKST": fcg.top_k_st(LOGITS, 2),
    }.get(name, fcg.top_k_st(LOGITS, 1))
    layer = MAKE[name](0.5, rngs=nnx.Rngs(0))
    calls = {
        "call": lambda: layer(LOGITS, deterministic=True),
        "view": lambda: nnx.view(layer, deterministic=True)(LOGITS),
        "no rngs": lambda: MAKE[name](0.5, deterministic=True)(LOGITS),
    }
    for call in calls.values():
        np.testing.assert_allclose(call(), expected, rtol=1e-6)
    assert not np.allclose(layer(LOGITS), expected)
    layer.eval()
    np.testing.assert_allclose(layer(LOGITS), expected, rtol=1e-6)
    layer.train()
    assert not np.allclose(layer(LOGITS), expected)


@by_name
def test_keys_may_come_with_the_call(name):
    layer = MAKE[name](0.5, rng_collection="choice")
    expected = layer(LOGITS, rngs=nnx.Rngs(choice=3).choice())
    np.testing.assert_array_equal(layer(LOGITS, rngs=nnx.Rngs(choice=3)), expected)
    np.testing.assert_array_equal(layer(LOGITS, rngs=nnx.Rngs(choice=3).choice), expected)
    own = MAKE[name](0.5, rngs=nnx.Rngs(0).sample)
    assert own(LOGITS).shape == LOGITS.shape
    with pytest.raises(ValueError, match=f"{type(layer).__name__}: a sample needs a key"):
        layer(LOGITS)
    with pytest.raises(ValueError, match=f"{type(layer).__name__}: give `deterministic`"):
        MAKE[name](0.5, deterministic=None)(LOGITS)


def test_the_k_largest_need_no_key():
    np.testing.assert_array_equal(fcg.TopKST(2)(LOGITS), fcg.top_k_st(LOGITS, 2))
    layer = fcg.TopKST(1, axis=0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(LOGITS), fcg.top_k_st(LOGITS, 1, axis=0))


@by_name
def test_a_temperature_may_be_learned_or_scheduled(name):
    key = jax.random.key(1)

    def loss(layer, **kwargs):
        return jnp.sum(jnp.sin(jnp.arange(6.0)) * layer(LOGITS, rngs=key, **kwargs))

    learned = MAKE[name](nnx.Param(jnp.array(0.5)))
    grads = nnx.grad(loss)(learned)
    scheduled = jax.grad(lambda t: loss(MAKE[name](3.0), temperature=t))(jnp.array(0.5))
    np.testing.assert_allclose(grads.temperature[...], scheduled, rtol=1e-6)
    assert (scheduled == 0) == (name == "ReinMax")
    held = MAKE[name](jnp.array(0.5))
    np.testing.assert_allclose(loss(held), loss(MAKE[name](0.5)), rtol=1e-6)


def test_bad_arguments():
    for name in ("GumbelSoftmax", "ReinMax"):
        with pytest.raises(ValueError, match=rf"{name}: temperature=0.0 must be positive"):
            MAKE[name](0.0)
    with pytest.raises(ValueError, match=r"TopKST: k=0 must be an integer of at least 1"):
        fcg.TopKST(0)
    with pytest.raises(ValueError, match=r"top_k_st: k=7 of the 6 classes"):
        fcg.TopKST(7)(LOGITS)


@pytest.mark.parametrize("name", ["GumbelSoftmax", "ReinMax", "TopKST"])
def test_logits_behind_a_layer_learn_a_choice(name):
    """A loss that wants class 3, through a hard choice."""
    layer = MAKE[name](rngs=nnx.Rngs(0))
    logits, want = jnp.zeros((20, 6)), jnp.eye(6)[3]

    @nnx.jit
    def step(layer, logits):
        return nnx.grad(lambda x, layer: jnp.sum((layer(x) - want) ** 2))(logits, layer)

    for _ in range(60):
        logits -= 0.5 * step(layer, logits)
    assert np.mean(np.asarray(fcg.top_k_st(logits, 1))[:, 3]) > 0.9
