"""A NaN is seen in what comes of it, also where XLA hands a computation to a library.

That happens from 4096 elements on, and a maximum or a minimum is a number there if one of its
arguments is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

ROW, ROWS, CLASSES = 3, 512, 128  # large enough for what is faster on one CPU
LABELS = np.arange(ROWS) % CLASSES
SHARES = np.full((ROWS, CLASSES), 1 / CLASSES, np.float32)

OF_ROWS = {
    "softmax": lambda x: fcg.softmax(x)[:, 0],
    "log_softmax": lambda x: fcg.log_softmax(x)[:, 0],
    "logsumexp": lambda x: fcg.logsumexp(x, -1),
    "labels": lambda x: fcg.softmax_cross_entropy_with_integer_labels(x, LABELS),
    "smooth labels": lambda x: fcg.softmax_cross_entropy_with_integer_labels(
        x, LABELS, label_smoothing=0.1, z_loss=1e-3
    ),
    "distributions": lambda x: fcg.softmax_cross_entropy(x, SHARES),
    "binary": lambda x: fcg.sigmoid_binary_cross_entropy(x, SHARES).sum(-1),
    "LayerNorm": lambda x: fcg.LayerNorm(CLASSES, rngs=nnx.Rngs(0))(x).sum(-1),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OF_ROWS)
def test_of_a_row(name, dtype, monkeypatch):
    """Alone, with a gradient, and where there is one CPU."""
    x = jax.random.normal(jax.random.key(0), (ROWS, CLASSES)).at[ROW, 5].set(jnp.nan).astype(dtype)
    f, expected = OF_ROWS[name], np.arange(ROWS) == ROW

    def both(x):
        y, pull = jax.vjp(f, x)
        return y, pull(jnp.ones_like(y))[0]

    y, dx = jax.jit(both)(x)
    np.testing.assert_array_equal(np.isnan(y), expected)
    np.testing.assert_array_equal(np.isnan(dx).any(-1), expected)
    np.testing.assert_array_equal(np.isnan(jax.jit(f)(x)), expected)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    # A context of its own: it is traced anew.
    with jax.make_user_context(default_value=False)(True):
        np.testing.assert_array_equal(np.isnan(jax.jit(f)(x)), expected)


@pytest.mark.parametrize("place", range(3), ids=["query", "key", "value"])
def test_of_attention(place):
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 160, 2, 16)).astype(np.float32)
    (q, k, v)[place][0, 7, 1, 2] = np.nan

    def both(attention, q, k, v):
        y, pull = jax.vjp(attention, q, k, v)
        return y, *pull(jnp.ones_like(y))

    both = jax.jit(both, static_argnums=0)
    ours, theirs = (
        [np.isnan(a) for a in both(module.dot_product_attention, q, k, v)] for module in (fcg, nnx)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_of_ctc():
    x = np.random.default_rng(0).normal(size=(4, 20, 64)).astype(np.float32)
    x[1, 5, 2] = np.nan
    labels, nothing = np.arange(1, 25).reshape(4, 6), np.zeros((4, 20))
    losses = jax.jit(fcg.ctc_loss)(x, nothing, labels, nothing[:, :6])
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False, False])
