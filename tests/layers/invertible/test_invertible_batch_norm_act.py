"""InvertibleBatchNormAct: the batch normalization and leaky ReLU of nnx, with less kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

X = jax.random.normal(jax.random.key(0), (6, 5, 4)) * 3 + 1


def ours(**kwargs):
    layer = fcg.InvertibleBatchNormAct(4, negative_slope=0.2, rngs=nnx.Rngs(0), **kwargs)
    if layer.scale is not None:
        layer.scale[...] = jnp.array([-1.5, 0.0, 0.3, 2.0])
        layer.bias[...] = jnp.array([0.5, -1.0, 0.0, 3.0])
    return layer


def of_nnx(x, layer, use_running_average=False):
    """What the layer computes, by nnx; the norm holds its parameters."""
    dtype = layer.scale.dtype
    norm = nnx.BatchNorm(4, use_fast_variance=False, param_dtype=dtype, rngs=nnx.Rngs(0))
    nnx.update(norm, nnx.state(layer))
    if layer.scale is not None:
        gamma = layer.scale[...]
        norm.scale[...] = jnp.where(gamma < 0, -gamma, gamma) + 1e-5
    return nnx.leaky_relu(norm(x, use_running_average), 0.2), norm


def loss(call):
    return lambda layer, x: jnp.sum(jnp.sin(call(layer, x)))


# nnx itself writes the float64 statistics to Variables of float32.
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
@pytest.mark.parametrize("evaluates", [False, True])
def test_values_and_gradients_are_those_of_nnx(evaluates):
    with jax.enable_x64(True):
        layer = ours(param_dtype=jnp.float64)
        layer.mean[...] = jnp.array([0.5, -0.5, 1.0, 0.0], jnp.float32)
        x = X.astype(jnp.float64)
        # A scale of 1e-5 costs half of the digits of x_hat.
        layer.scale[1] = 0.7
        for argnum in (0, 1):
            found = nnx.grad(loss(lambda m, x: m(x, evaluates)), argnums=argnum)(
                nnx.clone(layer), x
            )
            expected = nnx.grad(loss(lambda m, x: of_nnx(x, m, evaluates)[0]), argnums=argnum)(
                layer, x
            )
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


def test_statistics_are_updated_as_by_nnx():
    layer = ours()
    _, norm = of_nnx(X, layer)
    layer(X)
    np.testing.assert_allclose(layer.mean[...], norm.mean[...], rtol=1e-6)
    np.testing.assert_allclose(layer.var[...], norm.var[...], rtol=1e-6)


def test_a_scale_of_zero_has_a_gradient():
    layer = ours()
    grads = nnx.grad(loss(lambda m, x: m(x)))(layer, X)
    assert np.all(np.isfinite(grads.scale[...]))
    assert grads.scale[...][1] != 0


def test_it_keeps_its_output_alone():
    layer = ours()
    kept = fcg.residuals(lambda m, x: nnx.merge(*m)(x), nnx.split(layer), X)
    assert [r.shape for r in kept if r.nbytes >= X.nbytes] == [X.shape]
    assert sum(r.nbytes for r in kept) < X.nbytes + 300


def test_what_it_refuses():
    with pytest.raises(ValueError, match="negative_slope=0 must be positive"):
        fcg.InvertibleBatchNormAct(4, negative_slope=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"epsilon=0\.0 must be positive"):
        fcg.InvertibleBatchNormAct(4, epsilon=0.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="promote_dtype"):
        fcg.InvertibleBatchNormAct(4, promote_dtype=lambda *a, **k: a, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="got int32: cast it first"):
        ours()(jnp.ones((3, 4), jnp.int32))
    with pytest.raises(ValueError, match="use_running_average is None"):
        ours(use_running_average=None)(X)
