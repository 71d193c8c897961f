import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_customgrad as fcg
from flax_customgrad.estimators.codebook.usage import codebook_perplexity
from flax_customgrad.estimators.codebook.vector_quantizer import Codebook


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


call = nnx.jit(lambda layer, z: layer(z))


def quantizer(num_codes=16, features=4, **kwargs):
    return fcg.VectorQuantizer(num_codes, features, rngs=nnx.Rngs(0), **kwargs)


def statistics(layer):
    return [np.asarray(v[...]) for v in (layer.codebook, layer.counts, layer.sums)]


def assert_close(got, expected, rtol=1e-5):
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=rtol, atol=1e-6)


# What it returns.


def test_values_are_the_nearest_codes():
    layer, z = quantizer(), random(5, 7, 4)
    out = call(layer, z)
    codes = np.asarray(layer.codebook[...])
    nearest = np.argmin(((np.asarray(z)[..., None, :] - codes) ** 2).sum(-1), -1)
    np.testing.assert_array_equal(out.indices, nearest)
    np.testing.assert_array_equal(out.values, codes[nearest])
    expected = 1.25 * np.mean((np.asarray(z) - codes[nearest]) ** 2)
    np.testing.assert_allclose(out.loss, expected, rtol=1e-6)
    counts = np.bincount(nearest.ravel(), minlength=16)
    p = counts[counts > 0] / counts.sum()
    np.testing.assert_allclose(out.perplexity, np.exp(-(p * np.log(p)).sum()), rtol=1e-6)
    np.testing.assert_allclose(out.usage, np.mean(counts > 0))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("learning", ["loss", "ema"])
def test_half_precision(dtype, learning):
    layer = quantizer(param_dtype=dtype, learning=learning)
    out = call(layer, random(8, 4, dtype=dtype))
    assert out.values.dtype == dtype
    assert out.loss.dtype == out.perplexity.dtype == jnp.float32
    assert layer.codebook.dtype == (dtype if learning == "loss" else jnp.float32)
    # Squares beyond 65504 would be infinite in float16.
    assert np.isfinite(call(layer, jnp.full((8, 4), 1e4, dtype)).loss)


@pytest.mark.parametrize("learning", ["loss", "ema"])
def test_no_vectors(learning):
    layer = quantizer(learning=learning)
    before = layer.codebook[...]

    def total(layer, z):
        out = layer(z)
        return out.values.sum() + out.loss, out

    gradient = nnx.jit(nnx.grad(total, argnums=(0, 1), has_aux=True))
    (_, dz), out = gradient(layer, jnp.zeros((0, 4)))
    assert dz.shape == (0, 4)
    assert (out.loss, out.usage, out.perplexity) == (0, 0, 1)
    np.testing.assert_array_equal(layer.codebook[...], before)


def test_a_vector_with_nan_stays_one_and_spoils_nothing_else():
    layer = quantizer(learning="ema", dead_below=0.999)
    z = random(8, 4)
    out = call(layer, z.at[3, 2].set(jnp.nan))
    assert out.indices[3] == 16
    assert np.isnan(out.values[3]).all()
    assert np.isfinite(np.delete(out.values, 3, 0)).all()
    assert all(np.isfinite(part).all() for part in statistics(layer))


def test_perplexity_of_equal_and_of_single_codes():
    counts = np.full(8, 3), np.array([0, 5, 0]), np.zeros(4)
    found = jax.jit(lambda counts: [codebook_perplexity(n) for n in counts])(counts)
    np.testing.assert_allclose(found, [8, 1, 1], rtol=1e-6)


# The gradient: its formula is in the catalogue.


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_the_loss_is_taken_before_the_estimator(gradient):
    """Of the estimator's output it would be 0, or its gradient for z would be."""
    layer, z = quantizer(gradient=gradient), random(8, 4)

    def loss(layer, z):
        out = layer(z)
        return out.loss, out.indices

    (dlayer, dz), indices = nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))(layer, z)
    codes, indices = np.asarray(layer.codebook[...]), np.asarray(indices)
    difference = z - codes[indices]
    np.testing.assert_allclose(dz, 0.25 * 2 * difference / z.size, rtol=1e-5)
    dcodes = np.zeros_like(codes)
    np.add.at(dcodes, indices, -2 * difference / z.size)
    np.testing.assert_allclose(dlayer.codebook[...], dcodes, rtol=1e-5, atol=1e-8)


def test_only_four_bytes_a_vector_are_kept():
    z = random(64, 8)
    graphdef, state = nnx.split(quantizer(16, 8, gradient="rotation"))

    def call(state, z):
        out = nnx.merge(graphdef, state)(z)
        return out.values, out.loss

    assert fcg.residual_bytes(call, state, z) == 4 * 64


# The moving average.


def moved(layer, z, indices):
    """One update, in NumPy."""
    codes, counts, sums = (np.asarray(a, np.float64) for a in statistics(layer))
    chosen = np.eye(len(codes))[np.asarray(indices).ravel()]
    vectors = np.asarray(z, np.float64).reshape(-1, z.shape[-1])
    counts = layer.decay * counts + (1 - layer.decay) * chosen.sum(0)
    sums = layer.decay * sums + (1 - layer.decay) * chosen.T @ vectors
    smoothed = (counts + layer.epsilon) / (counts.sum() + len(codes) * layer.epsilon)
    moved = sums / (smoothed * counts.sum())[:, None]
    return np.where(chosen.any(0)[:, None], moved, codes), counts, sums


def test_statistics_follow_their_formula():
    layer = quantizer(learning="ema", decay=0.8, epsilon=1e-2)
    for seed in range(3):
        z = random(6, 5, 4, seed=seed)
        before = nnx.clone(layer)
        out = call(layer, z)
        assert_close(statistics(layer), moved(before, z, out.indices))
        # The values are of the codebook before.
        np.testing.assert_array_equal(out.values, before.codebook[...][out.indices])


def test_codes_without_vectors_stay_to_the_bit():
    layer = quantizer(learning="ema", decay=0.5)
    far = layer.codebook[...].at[5:].add(1e3)
    layer.codebook[...], layer.sums[...] = far, far
    layer = steps(layer, random(200, 32, 4))
    np.testing.assert_array_equal(layer.codebook[5:], far[5:])
    assert jnp.isfinite(layer.codebook[...]).all()
    # Their first vectors are where they go, however small their count has become.
    layer(jnp.full((32, 4), 1e3))
    assert jnp.abs(layer.codebook[5:] - far[5:]).max() > 0


def test_no_drift_where_vectors_are_the_codes():
    layer = quantizer(learning="ema", epsilon=1e-12)
    codes = layer.codebook[...]
    for _ in range(20):
        call(layer, codes)
    np.testing.assert_allclose(layer.codebook[...], codes, rtol=1e-5)


def test_eval_and_train_switch_the_updates():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), quantizer(learning="ema"))
    layer, x = model.layers[1], random(8, 3)
    before = layer.codebook[...]
    model.eval()
    model(x)
    np.testing.assert_array_equal(layer.codebook[...], before)
    model.train()
    layer(random(8, 4), use_running_average=True)
    np.testing.assert_array_equal(layer.codebook[...], before)
    model(x)
    assert (layer.codebook[...] != before).any()


@pytest.mark.smoke
def test_codes_of_a_moving_average_are_no_parameters():
    layer = quantizer(learning="ema", dead_below=0.5)
    assert not nnx.state(layer, nnx.Param)
    assert set(nnx.state(layer, Codebook)) == {"codebook", "counts", "sums"}
    assert set(nnx.state(quantizer(), nnx.Param)) == {"codebook"}


@pytest.mark.parametrize(("graph", "updates"), [(True, True), (True, False), (False, False)])
def test_updates_arrive_under_nnx_jit_and_grad(graph, updates):
    mode = {"graph": graph, "graph_updates": updates}
    layer, z = quantizer(learning="ema", gradient="rotation", dead_below=0.5), random(8, 4)
    expected = nnx.clone(layer)
    expected(z)

    def loss(layer, z):
        out = layer(z)
        return out.values.sum() + out.loss

    if updates:
        nnx.jit(nnx.grad(loss, argnums=1, **mode), **mode)(layer, z)
    else:
        # Without graph updates a transform of NNX hands state back as output.
        def step(layer, z):
            nnx.grad(loss, argnums=1, **mode)(layer, z)
            return nnx.clone(nnx.state(layer))

        nnx.update(layer, nnx.jit(step, **mode)(layer, z))
    assert_close(statistics(layer), statistics(expected))


def steps(layer, batches):
    """State after some steps, compiled once."""
    graphdef, state = nnx.split(layer)

    def step(state, z):
        layer = nnx.merge(graphdef, state)
        layer(z)
        return nnx.state(layer), None

    return nnx.merge(graphdef, jax.lax.scan(step, state, batches)[0])


def test_inside_scan():
    layer, batches = quantizer(learning="ema", dead_below=0.6), random(4, 8, 4)
    after = steps(layer, batches)
    for z in batches:
        layer(z)
    assert_close(statistics(after), statistics(layer))


# Dead codes.


def test_dead_codes_become_vectors_of_the_batch():
    layer = quantizer(learning="ema", decay=0.5, dead_below=0.6)
    z = 0.1 * random(64, 4) + 5
    nearest_before = nnx.jit(lambda m, z: m(z, use_running_average=True).indices)(layer, z)
    call(layer, z)
    codes, counts, sums = statistics(layer)
    dead = ~np.isin(np.arange(16), nearest_before)
    found = (codes[dead][:, None] == np.asarray(z)).all(-1)
    assert found.any(1).all()
    assert found.sum() == dead.sum() == len(np.unique(codes[dead], axis=0))
    np.testing.assert_allclose(counts[dead], 0.6)
    np.testing.assert_allclose(sums[dead], 0.6 * codes[dead], rtol=1e-6)


def test_no_more_codes_are_replaced_than_there_are_vectors():
    layer = quantizer(learning="ema", decay=0.5, dead_below=0.6)
    before, z = layer.codebook[...], random(3, 4)
    call(layer, z)
    assert (layer.codebook[...] != before).any(-1).sum() <= 6


def test_every_call_draws_anew():
    layer = quantizer(learning="ema", decay=0.5, dead_below=1e9)
    z = random(64, 4)
    call(layer, z)
    first = layer.codebook[...]
    call(layer, z)
    assert (layer.codebook[...] != first).any(-1).sum() > 8


def test_codes_in_use_are_left_alone():
    with_reset, without = quantizer(learning="ema", dead_below=1e-3), quantizer(learning="ema")
    call(with_reset, random(8, 4))
    call(without, random(8, 4))
    assert_close(statistics(with_reset), statistics(without), rtol=0)


# Padding.


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("learning", ["loss", "ema"])
def test_padding_counts_in_nothing(gradient, learning):
    arguments = {"gradient": gradient, "learning": learning, "decay": 0.5}
    if learning == "ema":
        arguments["dead_below"] = 1e9  # Each code is replaced by a vector of the batch.
    padded, alone = quantizer(**arguments), quantizer(**arguments)
    z = random(4, 6, 4)
    mask = jnp.arange(6) < jnp.array([[6], [3], [1], [5]])
    z = jnp.where(mask[..., None], z, jnp.nan).at[1, 4].set(1e3)
    g = random(4, 6, 4, seed=1)

    @nnx.jit
    def program(layer, z, g, **kwargs):
        def loss(layer, z):
            out = layer(z, **kwargs)
            return jnp.sum(out.values * g) + out.loss, out

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, z)

    (dlayer, dz), out = program(padded, z, g, mask=mask)
    (expected, dexpected), whole = program(alone, z[mask], g[mask])
    np.testing.assert_array_equal(out.indices[~mask], 16)
    np.testing.assert_array_equal(out.values[~mask], 0)
    np.testing.assert_array_equal(dz[~mask], 0)
    np.testing.assert_array_equal(out.values[mask], whole.values)
    np.testing.assert_allclose(dz[mask], dexpected, rtol=1e-5, atol=1e-7)
    for name in ("loss", "perplexity", "usage"):
        np.testing.assert_allclose(getattr(out, name), getattr(whole, name), rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (dlayer, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    if learning == "ema":
        codes, vectors = padded.codebook[...], z[mask]
        assert (codes[:, None] == vectors).all(-1).any(1).sum() == len(vectors)


def test_a_mask_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"VectorQuantizer: mask is int32; write an array of bool"):
        quantizer()(jnp.zeros((2, 4)), mask=jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\) and z \(2, 4\)"):
        quantizer()(jnp.zeros((2, 4)), mask=jnp.ones((2, 4), bool))


# Numbers, distances, and the codes to begin with.


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_numbers_decode_to_values(distance):
    layer = quantizer(distance=distance)
    out = call(layer, random(5, 7, 4).at[0, 0, 0].set(jnp.nan))
    np.testing.assert_array_equal(
        nnx.jit(lambda m, k: m.indices_to_codes(k))(layer, out.indices), out.values
    )


@pytest.mark.parametrize("learning", ["loss", "ema"])
def test_cosine_distance(learning):
    layer, z = quantizer(distance="cosine", learning=learning), 5 * random(9, 4)
    g = random(9, 4, seed=1)

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    @jax.jit
    def reference(z, codes):
        z, codes = unit(z), unit(codes)
        q = codes[jnp.argmax(z @ codes.T, -1)]
        fixed = jax.lax.stop_gradient
        loss = 0.25 * jnp.mean((z - fixed(q)) ** 2)
        loss += jnp.mean((fixed(z) - q) ** 2) if learning == "loss" else 0
        return jnp.sum((z + fixed(q - z)) * g) + loss, q

    codes = layer.codebook[...]
    expected, q = jax.grad(reference, argnums=(0, 1), has_aux=True)(z, codes)

    def loss(layer, z):
        out = layer(z)
        return jnp.sum(out.values * g) + out.loss, out

    (dlayer, dz), out = nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))(layer, z)
    np.testing.assert_allclose(out.values, q, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dz, expected[0], rtol=1e-4, atol=1e-6)
    if learning == "loss":
        np.testing.assert_allclose(dlayer.codebook[...], expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("learning", ["loss", "ema"])
def test_k_means_finds_the_groups_that_there_are(learning):
    centers = 10 * random(16, 4)
    z = centers[:, None] + 0.01 * random(16, 20, 4, seed=1)
    z = jnp.concatenate([z, jnp.full((1, 20, 4), jnp.nan)])
    mask = jnp.arange(17)[:, None] < jnp.full(20, 16)
    layer = quantizer(32, learning=learning)
    nnx.jit(lambda m, z, rngs: m.initialize_codebook(z, mask=mask, rngs=rngs))(
        layer, z, nnx.Rngs(1)
    )
    out = nnx.jit(lambda m, z: m(z, use_running_average=True, mask=mask))(layer, z)
    assert jnp.mean((out.values - jnp.where(mask[..., None], z, 0)) ** 2) < 1e-3
    if learning == "ema":
        codes, counts, sums = statistics(layer)
        np.testing.assert_array_equal(counts, np.bincount(out.indices[mask], minlength=32))
        np.testing.assert_allclose(sums, counts[:, None] * codes, rtol=1e-6)
    few = quantizer(8)
    few.initialize_codebook(random(3, 4), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(few(random(3, 4)).values, random(3, 4), rtol=1e-6)
    with pytest.raises(ValueError, match=r"there are no vectors to begin with"):
        few.initialize_codebook(jnp.zeros((0, 4)), rngs=nnx.Rngs(0))


# Devices.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_under_a_mesh_statistics_are_of_the_whole_batch(axis_type):
    layer, batches = quantizer(learning="ema", decay=0.8, dead_below=0.5), random(3, 32, 2, 4)
    expected = statistics(steps(layer, batches))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        spread = jax.device_put(batches, NamedSharding(mesh, P(None, "data", None, None)))
        found = statistics(jax.jit(functools.partial(_state_after, layer))(spread))
    assert_close(found, expected)


def _state_after(layer, batches):
    after = steps(layer, batches)
    return nnx.clone(after)


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_axis_name_adds_up(check_vma):
    layer = quantizer(learning="ema", decay=0.8, axis_name="data")
    expected = quantizer(learning="ema", decay=0.8)
    z = random(32, 4)
    whole = call(expected, z)
    graphdef, state = nnx.split(layer)

    def local(state, z):
        layer = nnx.merge(graphdef, state)
        out = layer(z)
        return nnx.state(layer), out.values, out.perplexity

    spread = jax.shard_map(
        local,
        mesh=jax.sharding.Mesh(np.array(jax.devices()), ("data",)),
        in_specs=(P(), P("data")),
        out_specs=(P(), P("data"), P()),
        check_vma=check_vma,
    )
    state, values, perplexity = jax.jit(spread)(state, z)
    assert_close(statistics(nnx.merge(graphdef, state)), statistics(expected))
    np.testing.assert_array_equal(values, whole.values)
    np.testing.assert_allclose(perplexity, whole.perplexity, rtol=1e-6)


def test_in_shard_map_dead_codes_take_vectors_of_all_devices():
    layer = quantizer(8, learning="ema", decay=0.5, dead_below=1e9, axis_name="data")
    z = random(32, 4)
    graphdef, state = nnx.split(layer)

    def local(state, z):
        layer = nnx.merge(graphdef, state)
        layer(z)
        return nnx.state(layer)

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    codes, *_ = statistics(nnx.merge(graphdef, jax.jit(spread)(state, z)))
    row, device = np.nonzero((codes[:, None] == np.asarray(z)).all(-1))
    np.testing.assert_array_equal(row, np.arange(8))
    np.testing.assert_array_equal(device // 4, np.arange(8))


# Errors.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_codes": 0}, "num_codes=0 must be an integer of at least 1"),
        ({"features": 2.0}, "features=2.0 must be an integer"),
        ({"gradient": "ste"}, "gradient='ste' is none of 'straight_through', 'rotation'"),
        ({"distance": "dot"}, "distance='dot' is none of 'euclidean', 'cosine'"),
        ({"learning": "EMA"}, "learning='EMA' is none of 'loss', 'ema'"),
        ({"commitment": -0.1}, "commitment=-0.1 must be a number of at least 0"),
        ({"commitment": float("nan")}, "commitment=nan must be"),
        ({"decay": 1.0}, "decay=1.0 must be at least 0 and below 1"),
        ({"decay": float("nan")}, "decay=nan"),
        ({"epsilon": 0}, "epsilon=0 must be positive"),
        ({"dead_below": 1.0}, 'write learning="ema"'),
        ({"dead_below": -1.0, "learning": "ema"}, "dead_below=-1.0 must be"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f"VectorQuantizer: .*{message}"):
        quantizer(**kwargs)


def test_bad_inputs():
    with pytest.raises(TypeError, match="VectorQuantizer: z is int32; write a floating array"):
        quantizer()(jnp.zeros((3, 4), jnp.int32))
    with pytest.raises(TypeError, match="z is list"):
        quantizer()([1.0])
    with pytest.raises(ValueError, match=r"z has shape \(3, 5\); its last axis must have 4"):
        quantizer()(jnp.zeros((3, 5)))
