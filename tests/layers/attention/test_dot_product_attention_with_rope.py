"""dot_product_attention_with_rope: rotated as each place says, and called where nnx's would be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

Q, K, V = (
    jax.random.normal(jax.random.key(i), (2, 5, heads, 4)) for i, heads in enumerate((4, 2, 2))
)
WITH_ROPE = [
    pytest.mark.skipif(
        not hasattr(nnx, "dot_product_attention_with_rope"),
        reason="this flax has no rotary position embeddings",
    ),
    pytest.mark.filterwarnings("ignore:.*value.*:DeprecationWarning"),  # of nnx.RoPE
]


def with_rope_of_nnx(test):
    for mark in WITH_ROPE:
        test = mark(test)
    return test


def rope(x, positions=None):
    places = jnp.arange(x.shape[-2]) if positions is None else positions
    a, b = jnp.split(x, 2, axis=-1)
    z = jax.lax.complex(a, b) * jnp.exp(1j * places)[:, None]
    return jnp.concatenate([z.real, z.imag], -1)


def attend(**kwargs):
    return fcg.dot_product_attention_with_rope(Q, K, V, rope=rope, **kwargs)


def test_only_distances_count():
    expected = attend()
    plain = fcg.dot_product_attention(Q, K, V)
    assert np.abs(expected - plain).max() > 0.1
    places = jnp.arange(5)
    for positions in (places + 3, (places + 3)[None], jnp.stack([places, places + 9])):
        np.testing.assert_allclose(attend(input_positions=positions), expected, atol=2e-5)
    ordinary = np.abs(attend(input_positions=2 * places) - expected).max()
    assert ordinary > 0.1


def test_each_example_has_positions_of_its_own():
    positions = jnp.stack([jnp.arange(5), jnp.array([0, 2, 4, 9, 1])])
    got = attend(input_positions=positions, is_causal=True)
    for i, places in enumerate(positions):
        alone = fcg.dot_product_attention_with_rope(
            Q[i], K[i], V[i], rope=rope, input_positions=places, is_causal=True
        )
        np.testing.assert_allclose(got[i], alone, atol=2e-6)


@pytest.mark.parametrize("positions", [jnp.array(3), jnp.arange(4), jnp.ones((3, 5))])
def test_positions_that_do_not_fit_are_refused(positions):
    with pytest.raises(ValueError, match=r"input_positions has shape .* write one of shape \(5,\)"):
        attend(input_positions=positions)


@with_rope_of_nnx
@pytest.mark.parametrize("cached", [True, False])
def test_it_is_the_function_of_nnx(cached):
    theirs = nnx.RoPE(embedding_size=4, max_seq_len=8) if cached else nnx.RoPE()

    def outcome(function):
        def loss(q, k, v):
            y = function(q, k, v, rope=theirs, is_causal=True)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(Q, K, V)

    expected = outcome(nnx.dot_product_attention_with_rope)
    for a, b in zip(
        jax.tree.leaves(outcome(fcg.dot_product_attention_with_rope)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


@with_rope_of_nnx
def test_a_converted_layer_that_holds_it_calls_ours():
    held = functools.partial(
        nnx.dot_product_attention_with_rope, rope=nnx.RoPE(embedding_size=4, max_seq_len=8)
    )
    layer = nnx.MultiHeadAttention(2, 8, decode=False, attention_fn=held, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    expected = layer(x, is_causal=True)
    fcg.convert(layer)
    assert layer.attention_fn.func is fcg.dot_product_attention_with_rope
    np.testing.assert_allclose(layer(x, is_causal=True), expected, atol=2e-6)
    places = jnp.broadcast_to(jnp.arange(6), (2, 6)) + 1
    again = layer(x, is_causal=True, input_positions=places)
    np.testing.assert_allclose(again, expected, atol=2e-5)
    assert fcg.revert(layer).attention_fn is held
