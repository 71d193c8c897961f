import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


def random(*shape, seed=0, dtype=jnp.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


call = nnx.jit(lambda layer, z: layer(z))


def test_each_codebook_quantizes_what_the_last_has_left():
    layer, z = fcg.ResidualVQ(3, 16, 4, rngs=nnx.Rngs(0)), random(5, 7, 4)

    @nnx.jit
    def in_turn(layer, z):
        left, found = z, []
        for stage in layer.stages:
            found.append(stage(left))
            left = left - found[-1].values
        return layer(z), left, found

    out, left, found = in_turn(layer, z)
    for i, of_stage in enumerate(found):
        np.testing.assert_array_equal(out.indices[..., i], of_stage.indices)
        np.testing.assert_allclose(out.perplexity[i], of_stage.perplexity, rtol=1e-6)
        np.testing.assert_allclose(out.usage[i], of_stage.usage)
    np.testing.assert_allclose(out.values, z - left, atol=1e-6)
    np.testing.assert_allclose(out.loss, sum(f.loss for f in found), rtol=1e-6)


def test_more_codebooks_leave_less():
    z = random(256, 4)

    @nnx.jit
    def after_ten_steps(layers):
        for layer in layers:
            nnx.fori_loop(0, 10, lambda _, m: (m(z), m)[1], layer)
        return [jnp.mean((layer(z).values - z) ** 2) for layer in layers]

    few, many = after_ten_steps(
        [fcg.ResidualVQ(n, 16, 4, learning="ema", decay=0.0, rngs=nnx.Rngs(0)) for n in (1, 4)]
    )
    assert many < few / 2


def test_the_estimator_comes_once():
    layer, z = fcg.ResidualVQ(5, 16, 4, rngs=nnx.Rngs(0)), random(8, 4)
    g = random(8, 4, seed=1)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(layer(z).values * g)))
    np.testing.assert_array_equal(gradient(z), g)


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
    call(layer, z)
    left = z
    for stage, moved in zip(stages, layer.stages, strict=True):
        left = left - call(stage, left).values
        np.testing.assert_allclose(moved.codebook[...], stage.codebook[...], rtol=1e-6)
    layer.eval()
    assert all(stage.use_running_average for stage in layer.stages)


def test_residuals_of_half_precision_are_in_float32():
    layer, z = fcg.ResidualVQ(4, 16, 4, rngs=nnx.Rngs(0)), random(64, 4, dtype=jnp.bfloat16)
    out, expected = jax.jit(lambda z: (layer(z), layer(z.astype(jnp.float32))))(z)
    assert out.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.indices, expected.indices)
    np.testing.assert_array_equal(out.values, np.asarray(expected.values, jnp.bfloat16))


@pytest.mark.smoke
def test_residual_vq_errors():
    with pytest.raises(ValueError, match="ResidualVQ: num_quantizers=0 must be"):
        fcg.ResidualVQ(0, 16, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_codes=0 must be"):
        fcg.ResidualVQ(2, 0, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"ResidualVQ: z has shape \(3, 5\)"):
        fcg.ResidualVQ(2, 16, 4, rngs=nnx.Rngs(0))(jnp.zeros((3, 5)))


def test_sim_vq_moves_codes_without_vectors_too():
    layer, z = fcg.SimVQ(16, 4, rngs=nnx.Rngs(0)), random(1, 4)

    @nnx.jit
    def step(layer):
        before, dlayer = layer.codes(), nnx.grad(lambda m: m(z).loss)(layer)
        layer.kernel[...] -= 0.1 * dlayer.kernel[...]
        return layer.codes() - before, dlayer

    moved, dlayer = step(layer)
    assert (np.abs(moved).max(-1) > 0).all()
    assert set(dlayer) == {"kernel"}


def test_sim_vq_values_are_nearest_mapped_codes():
    layer, z = fcg.SimVQ(16, 4, rngs=nnx.Rngs(0)), random(32, 4)
    codes = np.asarray(layer.codebook[...]) @ np.asarray(layer.kernel[...])
    nearest = np.argmin(((np.asarray(z)[:, None] - codes) ** 2).sum(-1), -1)
    out = call(layer, z)
    np.testing.assert_array_equal(out.indices, nearest)
    np.testing.assert_allclose(out.values, codes[nearest], rtol=1e-5, atol=1e-6)


def test_sim_vq_errors():
    with pytest.raises(ValueError, match="SimVQ: num_codes=0 must be"):
        fcg.SimVQ(0, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="SimVQ: gradient='none' is none of 'straight_through'"):
        fcg.SimVQ(4, 4, gradient="none", rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="SimVQ: z is int32"):
        fcg.SimVQ(4, 4, rngs=nnx.Rngs(0))(jnp.zeros((3, 4), jnp.int32))


# Padding, numbers, and codebooks that are dropped.


@pytest.mark.parametrize(
    "layer",
    [
        fcg.ResidualVQ(3, 16, 4, gradient="rotation", rngs=nnx.Rngs(0)),
        fcg.SimVQ(16, 4, rngs=nnx.Rngs(0)),
    ],
    ids=["ResidualVQ", "SimVQ"],
)
def test_padding_counts_in_nothing(layer):
    z, g = random(3, 5, 4), random(3, 5, 4, seed=1)
    mask = np.arange(5) < np.array([[5], [2], [3]])

    @nnx.jit
    def program(layer, z, g, mask):
        def loss(layer, z):
            out = layer(z, mask=mask)
            return jnp.sum(out.values * g) + out.loss, out

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, z)

    (dlayer, dz), out = program(layer, z, g, mask)
    (expected, dexpected), whole = program(layer, z[mask], g[mask], None)
    np.testing.assert_array_equal(out.indices[~mask], 16)
    np.testing.assert_array_equal(out.values[~mask], 0)
    np.testing.assert_array_equal(dz[~mask], 0)
    np.testing.assert_allclose(dz[mask], dexpected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(out.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(out.usage, whole.usage)
    for a, b in zip(*map(jax.tree.leaves, (dlayer, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    decoded = nnx.jit(lambda m, k: m.indices_to_codes(k))(layer, out.indices)
    np.testing.assert_allclose(decoded[mask], out.values[mask], rtol=1e-6, atol=1e-6)
    assert np.isnan(decoded[~mask]).all()


def test_dropped_codebooks_are_the_last_of_an_example():
    layer = fcg.ResidualVQ(
        4, 16, 4, learning="ema", decay=0.0, quantizer_dropout=0.75, rngs=nnx.Rngs(0)
    )
    whole = nnx.clone(layer)
    whole.eval()
    z = random(200, 3, 4)
    expected, out = call(whole, z), call(layer, z)
    assert (expected.indices < 16).all()
    used = out.indices < 16
    k = used.sum(-1)
    np.testing.assert_array_equal(used, np.arange(4) < k[..., None])
    np.testing.assert_array_equal(k, np.broadcast_to(k[:, :1], k.shape))
    # A quarter has all, and of the others a quarter each 1, 2, 3 and 4.
    np.testing.assert_allclose(np.bincount(k[:, 0])[1:] / 200, [3 / 16] * 3 + [7 / 16], atol=0.1)
    np.testing.assert_array_equal(out.indices[used], expected.indices[used])
    np.testing.assert_allclose(whole.indices_to_codes(out.indices), out.values, atol=1e-6)
    first_two = whole.indices_to_codes(out.indices[k[:, 0] == 2][..., :2])
    np.testing.assert_allclose(first_two, out.values[k[:, 0] == 2], atol=1e-6)
    assert (call(layer, z).indices != out.indices).any()
    with pytest.raises(ValueError, match=r"indices have shape \(2, 5\)"):
        whole.indices_to_codes(np.zeros((2, 5), np.int32))
    with pytest.raises(ValueError, match=r"quantizer_dropout=2 must be a probability"):
        fcg.ResidualVQ(2, 4, 4, quantizer_dropout=2, rngs=nnx.Rngs(0))


def test_each_codebook_begins_with_what_is_left():
    layer, z = fcg.ResidualVQ(3, 16, 4, rngs=nnx.Rngs(0)), 5 + random(256, 4)
    before = nnx.jit(lambda m, z: jnp.mean((m(z).values - z) ** 2))
    random_codes = before(layer, z)
    nnx.jit(lambda m, z, rngs: m.initialize_codebook(z, rngs=rngs))(layer, z, nnx.Rngs(1))
    assert before(layer, z) < random_codes / 50


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_sim_vq_begins_with_means_and_goes_on_learning(distance):
    centers = 10 * random(16, 4)
    z = centers[:, None] + 0.01 * random(16, 20, 4, seed=1)
    layer = fcg.SimVQ(32, 4, distance=distance, rngs=nnx.Rngs(0))

    @nnx.jit
    def program(layer, z, rngs):
        layer.initialize_codebook(z, iterations=4, rngs=rngs)
        return layer(z).values, nnx.grad(lambda m: m(z).loss)(layer)

    values, grads = program(layer, z, nnx.Rngs(1))
    expected = z if distance == "euclidean" else z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    np.testing.assert_allclose(values, expected, atol=0.1 if distance == "euclidean" else 0.01)
    assert set(grads) == {"kernel"}
    assert jnp.any(grads.kernel[...])
    with pytest.raises(ValueError, match=r"SimVQ: z has shape .* there are no vectors to begin"):
        layer.initialize_codebook(jnp.zeros((0, 4)), rngs=nnx.Rngs(0))


def test_sim_vq_cosine_distance():
    layer = fcg.SimVQ(16, 4, gradient="straight_through", distance="cosine", rngs=nnx.Rngs(0))
    z, g = 5 * random(9, 4), random(9, 4, seed=1)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    fixed = jax.lax.stop_gradient

    @jax.jit
    def reference(z, kernel):
        z, codes = unit(z), unit(jnp.dot(layer.codebook[...], kernel, precision="highest"))
        q = codes[jnp.argmax(z @ codes.T, -1)]
        loss = 0.25 * jnp.mean((z - fixed(q)) ** 2) + jnp.mean((fixed(z) - q) ** 2)
        return jnp.sum((z + fixed(q - z)) * g) + loss, q

    (dz, dkernel), q = jax.grad(reference, argnums=(0, 1), has_aux=True)(z, layer.kernel[...])

    def loss(layer, z):
        out = layer(z)
        return jnp.sum(out.values * g) + out.loss, out

    (dlayer, found), out = nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))(layer, z)
    np.testing.assert_allclose(out.values, q, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, dz, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dlayer.kernel[...], dkernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(layer.indices_to_codes(out.indices), out.values)
    with pytest.raises(ValueError, match="SimVQ: distance='dot' is none of 'euclidean', 'cosine'"):
        fcg.SimVQ(4, 4, distance="dot", rngs=nnx.Rngs(0))


def test_residual_vq_cosine_finds_directions_and_keeps_lengths():
    layer, z = fcg.ResidualVQ(2, 16, 4, distance="cosine", rngs=nnx.Rngs(0)), random(30, 4)
    out, r, total = call(layer, z), np.asarray(z), 0
    for i, stage in enumerate(layer.stages):
        codes = np.asarray(stage.codebook[...])
        cosines = r @ codes.T / np.linalg.norm(codes, axis=-1)
        np.testing.assert_array_equal(out.indices[:, i], np.argmax(cosines, -1))
        r, total = r - codes[out.indices[:, i]], total + codes[out.indices[:, i]]
    np.testing.assert_allclose(out.values, total, rtol=1e-5, atol=1e-6)

    # Means of what has a direction in common come nearer than random codes.
    @nnx.jit
    def begin(layer, z, rngs):
        layer.initialize_codebook(z, rngs=rngs)
        return layer(z).values

    assert jnp.mean((begin(layer, z, nnx.Rngs(1)) - z) ** 2) < jnp.mean((out.values - z) ** 2) / 4
