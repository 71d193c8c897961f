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
    shape = (2, *[7, 6][: len(window)], features[0])
    return *made, np.random.default_rng(1).standard_normal(shape, np.float32)


def values(a, axes):
    return encode_int8(a, axes).values(jnp.float32)


def gradients(layer, kernel, x, g=None):
    """Output and gradients with another kernel, or the layer's own."""
    graphdef, params = nnx.split(layer)
    if kernel is not None:
        params["kernel"] = kernel
    y, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
    return y, *pull(jnp.sin(y) if g is None else g)


def all_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_convolution_of_what_the_codes_stand_for(kind):
    layer, plain, x = pair(kind)

    @jax.jit
    def both(w, x):
        rounded = values(w, tuple(range(w.ndim - 1))), values(x, tuple(range(1, x.ndim)))
        return gradients(layer, w, x), gradients(plain, *rounded)

    all_close(*both(layer.kernel[...], x))


@pytest.mark.parametrize("kind", ["dense", "dilated"])
def test_the_backward_in_int8(kind):
    layer, plain, x = pair(kind)
    layer = fcg.Int8Conv.from_layer(layer, backward="int8")
    plain.bias = None

    @jax.jit
    def both(w, x):
        int8_w, int8_x = (
            encode_int8(a, axes)
            for a, axes in ((w, tuple(range(w.ndim - 1))), (x, tuple(range(1, x.ndim))))
        )
        shape = jax.eval_shape(layer, x).shape
        g = jnp.asarray(np.random.default_rng(2).standard_normal(shape, np.float32))
        channels = tuple(range(g.ndim - 1))
        u = values(g * int8_w.scale.reshape(-1), tuple(range(1, g.ndim)))
        v = values(g * int8_x.scale, channels)
        _, grads, dx = gradients(layer, w, x, g)
        found = dx, grads["kernel"], grads["bias"]
        dx = gradients(plain, int8_w.codes.astype(jnp.float32), x, u)[2]
        dw = gradients(plain, w, int8_x.codes.astype(jnp.float32), v)[1]["kernel"]
        return found, (dx, dw, g.sum(channels))

    all_close(*both(layer.kernel[...], x))


def test_batches_masks_and_what_is_not_finite():
    masked = jnp.ones((3, 4, 2)).at[0].set(0)
    layer = fcg.Int8Conv(4, 2, (3,), mask=masked, padding="CAUSAL", rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 4), np.float32)
    x[..., 0, 0] = 9
    run = jax.jit(layer)
    y = np.asarray(run(x))
    all_close(y[1, 2], run(x[1, 2]))
    # A window of 3 whose first element is masked.
    unseen, bad = x.copy(), x.copy()
    unseen[..., 0, 1:] = 0
    bad[0, 1, 2, 3] = np.nan
    np.testing.assert_array_equal(y[..., 2:, :], np.asarray(run(unseen))[..., 2:, :])
    assert jax.eval_shape(layer, jnp.asarray(x[:0])).shape == (0, 3, 8, 2)
    broken = run(bad)
    np.testing.assert_array_equal(np.isfinite(broken).any((2, 3)), [[1, 0, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="the layer was made for in_features=4"):
        layer(x[..., :3])
    with pytest.raises(ValueError, match="Int8Conv computes its product itself"):
        fcg.Int8Conv(4, 2, (3,), conv_general_dilated=max, rngs=nnx.Rngs(0))
