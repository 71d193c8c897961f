"""What `implementation="cudnn"` asks of `jax.nn.dot_product_attention`, here computed by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.layers.attention import cudnn

RNG = np.random.default_rng(0)
T, N, D = 12, 4, 8


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.bfloat16)


def heads(*batch, of_keys=N):
    return normal(*batch, T, N, D), normal(*batch, T, of_keys, D), normal(*batch, T, of_keys, D)


@pytest.fixture
def asked(monkeypatch):
    """The keywords that the function of JAX was called with."""
    found = {}

    def by_xla(*arrays, implementation, **kwargs):
        found.update(kwargs, implementation=implementation)
        return of_jax(*arrays, **kwargs, implementation="xla")

    of_jax = cudnn._of_jax
    monkeypatch.setattr(cudnn, "_of_jax", by_xla)
    return found


MASK = jnp.asarray((RNG.random((2, 1, T, T)) < 0.7) | (np.arange(T) == 0))
CASES = {
    "causal": (heads(2), {"is_causal": True}),
    "a window, causal": (heads(2), {"is_causal": True, "window": 3}),
    "a window, groups": (heads(2, of_keys=2), {"window": (3, 2)}),
    "segments": (heads(2), {"is_causal": True, "segment_ids": jnp.arange(T) // 5}),
    "bias and mask": (heads(2), {"bias": normal(N, T, T), "mask": MASK}),
    "no batch axis": (heads(), {"mask": MASK[0]}),
    "two batch axes": (heads(3, 2), {"mask": MASK, "bias": normal(T, T)}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_attention_of_tiles(case, asked):
    arrays, kwargs = CASES[case]

    def loss(q, k, v, implementation):
        y = fcg.dot_product_attention(q, k, v, **kwargs, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    ((_, y), gradients), ((_, expected), expected_gradients) = (
        step(*arrays, implementation) for implementation in ("cudnn", "tiles")
    )
    assert asked["implementation"] == "cudnn"
    for got, want in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (got, want)), atol=6e-2)


def test_kernels_get_a_window_of_causal_queries_as_such(asked):
    q, k, v = heads(2)
    attend = functools.partial(fcg.dot_product_attention, q, k, v, implementation="cudnn")
    attend(is_causal=True, window=(3, None))
    assert (asked["local_window_size"], asked["mask"]) == ((3, 0), None)
    attend(window=(3, None))
    assert asked["local_window_size"] is None
    assert asked["mask"].shape == (2, 1, T, T)


def test_a_multi_head_attention_can_ask_for_it(asked):
    attention_fn = functools.partial(fcg.dot_product_attention, implementation="cudnn")
    layer = fcg.MultiHeadAttention(
        2, 8, dtype=jnp.bfloat16, decode=False, attention_fn=attention_fn, rngs=nnx.Rngs(0)
    )
    assert layer(normal(2, T, 8)).shape == (2, T, 8)
    assert asked["implementation"] == "cudnn"


def test_what_the_kernels_do_not_take(asked):
    q, k, v = heads(2)
    attend = functools.partial(fcg.dot_product_attention, implementation="cudnn")
    with pytest.raises(ValueError, match="of float32: its kernels take bfloat16 and float16"):
        attend(*(a.astype(jnp.float32) for a in (q, k, v)))
    with pytest.raises(ValueError, match=r"with dropout: .* write .* deterministic=True"):
        attend(q, k, v, dropout_rate=0.1, dropout_rng=jax.random.key(0))
    with pytest.raises(ValueError, match="implementation='xla' is none of 'tiles', 'cudnn'"):
        fcg.dot_product_attention(q, k, v, implementation="xla")


def test_without_such_a_gpu_jax_says_so():
    with pytest.raises(RuntimeError, match="cuDNN"):
        fcg.dot_product_attention(*heads(2), implementation="cudnn")
