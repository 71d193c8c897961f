import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


def random(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def test_each_codebook_quantizes_what_the_last_has_left():
    layer, z = fcg.ResidualVQ(3, 16, 4, rngs=nnx.Rngs(0)), random(5, 7, 4)
    out = layer(z)
    left, loss = z, 0.0
    for i, stage in enumerate(layer.stages):
        found = stage(left)
        np.testing.assert_array_equal(out.indices[..., i], found.indices)
        np.testing.assert_allclose(out.perplexity[i], found.perplexity)
        np.testing.assert_allclose(out.usage[i], found.usage)
        left, loss = left - found.values, loss + found.loss
    np.testing.assert_allclose(out.values, z - left, atol=1e-6)
    np.testing.assert_allclose(out.loss, loss, rtol=1e-6)


def test_more_codebooks_leave_less():
    z = random(256, 4)
    stages = [fcg.ResidualVQ(n, 16, 4, learning="ema", decay=0.0, rngs=nnx.Rngs(0)) for n in (1, 4)]
    for layer in stages:
        for _ in range(10):
            layer(z)
    few, many = (jnp.mean((layer(z).values - z) ** 2) for layer in stages)
    assert many < few / 2


def test_the_estimator_comes_once():
    layer, z = fcg.ResidualVQ(5, 16, 4, rngs=nnx.Rngs(0)), random(8, 4)
    g = random(8, 4, seed=1)
    np.testing.assert_array_equal(jax.grad(lambda z: jnp.sum(layer(z).values * g))(z), g)


def test_indices_alone_are_kept():
    layer, z = fcg.ResidualVQ(5, 16, 4, gradient="rotation", rngs=nnx.Rngs(0)), random(64, 4)
    graphdef, params = nnx.split(layer)

    def call(params, z):
        out = nnx.merge(graphdef, params)(z)
        return out.values, out.loss

    assert fcg.residual_bytes(call, params, z) == 4 * 64 * 5


def test_moving_averages_of_residuals():
    layer = fcg.ResidualVQ(2, 16, 4, learning="ema", decay=0.5, rngs=nnx.Rngs(0))
    stages = [nnx.clone(stage) for stage in layer.stages]
    z = random(32, 4)
    layer(z)
    left = z
    for stage, moved in zip(stages, layer.stages, strict=True):
        left = left - stage(left).values
        np.testing.assert_allclose(moved.codebook[...], stage.codebook[...], rtol=1e-6)
    layer.eval()
    assert all(stage.use_running_average for stage in layer.stages)


def test_residuals_of_half_precision_are_in_float32():
    layer, z = fcg.ResidualVQ(4, 16, 4, rngs=nnx.Rngs(0)), random(64, 4, dtype=jnp.bfloat16)
    out, expected = layer(z), layer(z.astype(jnp.float32))
    assert out.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.indices, expected.indices)
    np.testing.assert_array_equal(out.values, expected.values.astype(jnp.bfloat16))


def test_residual_vq_errors():
    with pytest.raises(ValueError, match="ResidualVQ: num_quantizers=0 must be"):
        fcg.ResidualVQ(0, 16, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_codes=0 must be"):
        fcg.ResidualVQ(2, 0, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"ResidualVQ: z has shape \(3, 5\)"):
        fcg.ResidualVQ(2, 16, 4, rngs=nnx.Rngs(0))(jnp.zeros((3, 5)))


def test_sim_vq_moves_codes_without_vectors_too():
    layer, z = fcg.SimVQ(16, 4, rngs=nnx.Rngs(0)), random(1, 4)
    before = layer.codes()
    dlayer = nnx.grad(lambda m: m(z).loss)(layer)
    layer.kernel[...] -= 0.1 * dlayer.kernel[...]
    assert (jnp.abs(layer.codes() - before).max(-1) > 0).all()
    assert set(dlayer) == {"kernel"}


def test_sim_vq_values_are_nearest_mapped_codes():
    layer, z = fcg.SimVQ(16, 4, rngs=nnx.Rngs(0)), random(32, 4)
    codes = np.asarray(layer.codebook[...]) @ np.asarray(layer.kernel[...])
    nearest = np.argmin(((np.asarray(z)[:, None] - codes) ** 2).sum(-1), -1)
    out = layer(z)
    np.testing.assert_array_equal(out.indices, nearest)
    np.testing.assert_allclose(out.values, codes[nearest], rtol=1e-5, atol=1e-6)


def test_sim_vq_errors():
    with pytest.raises(ValueError, match="SimVQ: num_codes=0 must be"):
        fcg.SimVQ(0, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="SimVQ: gradient='none' is none of 'straight_through'"):
        fcg.SimVQ(4, 4, gradient="none", rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="SimVQ: z is int32"):
        fcg.SimVQ(4, 4, rngs=nnx.Rngs(0))(jnp.zeros((3, 4), jnp.int32))
