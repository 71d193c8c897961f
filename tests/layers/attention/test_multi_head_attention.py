"""MultiHeadAttention takes the place of nnx's: results, dropout, cache, weights, injections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

X = jax.random.normal(jax.random.key(0), (2, 10, 6))
Y = jax.random.normal(jax.random.key(1), (2, 7, 5))


def made(library, *args, **kwargs):
    kwargs.setdefault("decode", False)
    return library.MultiHeadAttention(*args, **kwargs, rngs=nnx.Rngs(0, dropout=1))


def both(*args, **kwargs):
    return made(fcg, *args, **kwargs), made(nnx, *args, **kwargs)


def outcome(layer, call):
    def loss(layer):
        y = call(layer)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    (_, y), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(layer)
    return y, gradients


CASES = {
    "dropout, causal": (
        (4, 6, 8, 3),
        {"dropout_rate": 0.5},
        lambda layer: layer(X, is_causal=True, deterministic=False),
    ),
    "keys of another input, groups, normalized": (
        (4, 6, 32),
        {"num_kv_heads": 2, "in_kv_features": 5, "normalize_qk": True, "use_bias": False},
        lambda layer: layer(X, Y, mask=nnx.make_attention_mask(X[..., 0] < 9, Y[..., 0] < 1)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_layer_of_nnx(case):
    args, kwargs, call = CASES[case]
    ours, theirs = both(*args, **kwargs)
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))
    (y, got), (expected_y, expected) = outcome(ours, call), outcome(theirs, call)
    np.testing.assert_allclose(y, expected_y, atol=2e-6)
    # The bias of keys changes no weight: its gradient is rounding.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def test_its_layers_are_of_this_library():
    layer = made(fcg, 2, 6, normalize_qk=True)
    assert {type(part) for _, part in nnx.iter_modules(layer)} == {
        fcg.MultiHeadAttention,
        fcg.LinearGeneral,
        fcg.LayerNorm,
    }


def test_decoding_meets_the_cache_of_nnx():
    ours, theirs = both(2, 6, decode=True)
    for layer in (ours, theirs):
        layer.init_cache(X.shape)
    for i in range(3):
        token = X[:, i : i + 1]
        np.testing.assert_allclose(ours(token), theirs(token), atol=2e-6)
    np.testing.assert_allclose(ours.cached_key[...], theirs.cached_key[...], atol=1e-6)
    assert int(ours.cache_index[...]) == 3
    whole = ours(X[:, :3], is_causal=True, decode=False)
    again = made(fcg, 2, 6, decode=True)
    again.init_cache(X.shape)
    tokens = [again(X[:, i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(jnp.concatenate(tokens, 1), whole, atol=2e-6)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_weights_are_sown_as_nnx_sows_them():
    ours, theirs = both(2, 6)
    for layer in (ours, theirs):
        layer(X, sow_weights=True)
    (got,), (expected,) = (m.attention_weights.get_value() for m in (ours, theirs))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_function_of_the_users_own_is_called():
    calls = []

    def attend(query, key, value, **kwargs):
        calls.append(kwargs)
        return value

    layer = made(fcg, 2, 6, attention_fn=attend)
    assert layer.attention_fn is attend
    layer(X)
    assert len(calls) == 1
    layer.attention_fn = functools.partial(fcg.dot_product_attention, window=0)
    np.testing.assert_allclose(layer(X), layer.out(layer.value(X)), atol=1e-6)


def test_a_partial_of_the_function_of_nnx_is_one_of_ours():
    attend = functools.partial(nnx.dot_product_attention, bias=jnp.ones(()))
    layer = made(fcg, 2, 6, attention_fn=attend)
    assert layer.attention_fn.func is fcg.dot_product_attention
    assert layer.attention_fn.keywords == attend.keywords
    assert vars(layer)["attention_fn"] is attend


def test_what_it_holds_is_what_it_was_given():
    """So that it is a layer of nnx again when its class is."""
    model = nnx.Sequential(made(nnx, 2, 6))
    expected = model(X)
    layer = fcg.convert(model).layers[0]
    assert type(layer) is fcg.MultiHeadAttention
    assert type(layer.query) is fcg.LinearGeneral
    assert layer.attention_fn is fcg.dot_product_attention
    for again in (nnx.merge(*nnx.split(layer)), nnx.clone(layer)):
        assert again.attention_fn is fcg.dot_product_attention
        np.testing.assert_allclose(again(X), expected, atol=2e-6)
    reverted = fcg.revert(model).layers[0]
    assert type(reverted) is nnx.MultiHeadAttention
    assert reverted.attention_fn is nnx.dot_product_attention
