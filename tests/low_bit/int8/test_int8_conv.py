"""Int8Conv: every kind of convolution, against one of what the codes stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.low_bit.int8.int8_codes import encode_int8

KINDS = {
    "dense": ((5, 3), (3, 3), {"strides": 2}),
    "depthwise": ((4, 4), (3,), {"feature_group_count": 4, "padding": "CIRCULAR"}),
    "dilated": ((4, 3), (3,), {"kernel_dilation": 2, "padding": "REFLECT"}),
    "spread": ((4, 3), (3,), {"input_dilation": 2, "padding": 1}),
}


def pair(kind):
    """A layer, one of floats, and images."""
    features, window, kwargs = KINDS[kind]
    made = [cls(*features, window, **kwargs, rngs=nnx.Rngs(0)) for cls in (fcg.Int8Conv, fcg.Conv)]
    return *made, jax.random.normal(jax.random.key(1), (2, *[7, 6][: len(window)], features[0]))


def gradients(layer, x, g):
    graphdef, params = nnx.split(layer)

    @jax.jit
    def run(params, x, g):
        y, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
        return y, *pull(jnp.sin(y) if g is None else g)

    return run(params, x, g)


def all_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_convolution_of_what_the_codes_stand_for(kind):
    layer, plain, x = pair(kind)
    w = layer.kernel[...]
    plain.kernel[...] = encode_int8(w, tuple(range(w.ndim - 1))).values(jnp.float32)
    rounded = encode_int8(x, tuple(range(1, x.ndim))).values(jnp.float32)
    found = gradients(layer, x, None)
    all_close(found, gradients(plain, rounded, None))


@pytest.mark.parametrize("kind", ["dense", "dilated"])
def test_the_backward_in_int8(kind):
    layer, plain, x = pair(kind)
    layer = fcg.Int8Conv.from_layer(layer, backward="int8")
    w, plain.bias = layer.kernel[...], None
    int8_w, int8_x = (
        encode_int8(w, tuple(range(w.ndim - 1))),
        encode_int8(x, tuple(range(1, x.ndim))),
    )
    g = jax.random.normal(jax.random.key(2), jax.eval_shape(layer, x).shape)
    u = encode_int8(g * int8_w.scale.reshape(-1), tuple(range(1, g.ndim))).values(jnp.float32)
    v = encode_int8(g * int8_x.scale, tuple(range(g.ndim - 1))).values(jnp.float32)
    _, grads, dx = gradients(layer, x, g)
    plain.kernel[...] = int8_w.codes.astype(jnp.float32)
    all_close(dx, gradients(plain, x, u)[2])
    multiples = int8_x.codes.astype(jnp.float32)
    all_close(grads["kernel"], gradients(plain, multiples, v)[1]["kernel"])
    all_close(grads["bias"], g.sum(tuple(range(g.ndim - 1))))


def test_batches_masks_and_what_is_not_finite():
    masked = jnp.ones((3, 4, 2)).at[0].set(0)
    layer = fcg.Int8Conv(4, 2, (3,), mask=masked, padding="CAUSAL", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 8, 4)).at[..., 0, 0].set(9)
    run = jax.jit(layer)
    y = run(x)
    all_close(y[1, 2], run(x[1, 2]))
    # A window of 3 whose first element is masked.
    np.testing.assert_array_equal(y[..., 2:, :], run(x.at[..., 0, 1:].set(0))[..., 2:, :])
    assert run(x[:0]).shape == (0, 3, 8, 2)
    broken = run(x.at[0, 1, 2, 3].set(jnp.nan))
    np.testing.assert_array_equal(np.isfinite(broken).any((2, 3)), [[1, 0, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="the layer was made for in_features=4"):
        layer(x[..., :3])
    with pytest.raises(ValueError, match="Int8Conv computes its product itself"):
        fcg.Int8Conv(4, 2, (3,), conv_general_dilated=max, rngs=nnx.Rngs(0))
