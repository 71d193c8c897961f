"""BatchNorm's statistics: the running ones, those of a split batch, and their cotangents."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flax_customgrad as fcg
from flax_customgrad.layers.normalization.axes import NormAxes
from flax_customgrad.layers.normalization.config import NormConfig
from flax_customgrad.layers.normalization.normalize import normalize

X = 100 + jax.random.normal(jax.random.key(0), (16, 2, 6))
G = jax.random.normal(jax.random.key(1), X.shape)
MASK = jax.random.bernoulli(jax.random.key(2), 0.4, (16, 2, 1))
MASK = MASK.at[:2].set(False)  # the first of 8 devices has nothing
SPLIT = PartitionSpec("batch")
ALL = PartitionSpec()


def layer_of(module=fcg, **kwargs):
    return module.BatchNorm(6, rngs=nnx.Rngs(0), **kwargs)


def training(layer):
    """Output, running statistics and gradients, as a function of (state, x, g, mask)."""
    graphdef, state = nnx.split(layer)

    def run(state, x, g, mask):
        def call(state, x):
            m = nnx.merge(graphdef, state, copy=True)
            y = m(x) if mask is None else m(x, mask=mask)
            return y, nnx.state(m, nnx.BatchStat)

        y, pull, statistics = jax.vjp(call, state, x, has_aux=True)
        grads, dx = pull(g)
        return y, dx, statistics, grads["scale"][...], grads["bias"][...]

    return run, state


@functools.cache
def of_one_device(masked=False):
    """The results for the whole batch, on one device."""
    run, state = training(layer_of())
    return jax.jit(run)(state, X, G, MASK if masked else None)


@pytest.mark.parametrize("mask", [None, MASK], ids=["", "masked"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_batch_split_over_devices_is_one_batch(check_vma, mask):
    _, state = training(layer_of())
    expected = of_one_device(mask is not None)
    split, _ = training(layer_of(axis_name="batch"))

    def on_devices(state, x, g, mask):
        y, dx, statistics, *grads = split(state, x, g, mask)
        if not check_vma:
            grads = jax.lax.psum(grads, "batch")
        return y, dx, statistics, *grads

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        on_devices,
        mesh=mesh,
        in_specs=(ALL, SPLIT, SPLIT, SPLIT),
        out_specs=(SPLIT, SPLIT, ALL, ALL, ALL),
        check_vma=check_vma,
    )
    got = jax.jit(mapped)(state, X, G, mask)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharded_batch_is_one_batch(axis_type):
    run, state = training(layer_of())
    expected = of_one_device()
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        x, g = (jax.device_put(a, NamedSharding(mesh, SPLIT)) for a in (X, G))
        got = jax.jit(run)(state, x, g, None)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_groups_of_devices_share_statistics():
    groups = [[0, 2, 4, 6], [1, 3, 5, 7]]
    layer = layer_of(axis_name="batch", axis_index_groups=groups)
    run, state = training(layer)
    x, g = (a.reshape(8, 2, 2, 6) for a in (X, G))
    y, dx, *_ = jax.pmap(run, axis_name="batch", in_axes=(None, 0, 0, None))(state, x, g, None)
    whole = jax.jit(training(layer_of())[0])
    for start in (0, 1):
        merged = [a[start::2].reshape(8, 2, 6) for a in (x, g)]
        expected = whole(state, *merged, None)
        np.testing.assert_allclose(y[start::2].reshape(8, 2, 6), expected[0], atol=2e-5)
        np.testing.assert_allclose(dx[start::2].reshape(8, 2, 6), expected[1], atol=2e-5)


def test_a_named_axis_of_vmap():
    run, state = training(layer_of(axis_name="batch"))
    x, g = (a.reshape(8, 2, 2, 6) for a in (X, G))
    mapped = jax.vmap(run, axis_name="batch", in_axes=(None, 0, 0, None))
    y, dx, *_ = jax.jit(mapped)(state, x, g, None)
    expected = of_one_device()
    np.testing.assert_allclose(y.reshape(X.shape), expected[0], atol=2e-5)
    np.testing.assert_allclose(dx.reshape(X.shape), expected[1], atol=2e-5)


@pytest.mark.parametrize(
    ("sizes", "epsilon"),
    [((1e20, 1.0), 1e-5), ((1e20, 0.0), 1e-5), ((1e-25, 1.0), 0.0), ((1e-25, 0.0), 0.0)],
    ids=["huge and normal", "huge and zero", "tiny and normal", "tiny and zero"],
)
def test_devices_with_values_of_different_size(sizes, epsilon):
    """Each has squared its own by a factor of its own."""
    x = X * jnp.repeat(jnp.array(sizes, jnp.float32), 8)[:, None, None]
    run, state = training(layer_of(axis_name="batch", epsilon=epsilon))
    mapped = jax.vmap(run, axis_name="batch", in_axes=(None, 0, 0, None))
    y, dx, *_ = jax.jit(mapped)(state, *(a.reshape(8, 2, 2, 6) for a in (x, G)), None)

    x = np.asarray(x, np.float64)
    deviation = x - x.mean((0, 1))
    rstd = 1 / np.sqrt((deviation**2).mean((0, 1)) + epsilon)
    x_hat = deviation * rstd
    expected = rstd * (G - G.mean((0, 1)) - x_hat * (G * x_hat).mean((0, 1)))
    np.testing.assert_allclose(y.reshape(X.shape), x_hat, atol=2e-5)
    np.testing.assert_allclose(dx.reshape(X.shape) / rstd, expected / rstd, atol=2e-5)


@pytest.mark.parametrize("size", [1e18, 1e19, 1e20])
def test_a_huge_variance_is_written_down_where_float32_holds_it(size):
    """That of 1e19 is 1e38, that of 1e20 infinite."""
    layer = layer_of(momentum=0.0)
    layer.train()
    x = size * np.random.default_rng(0).normal(size=(16, 2, 6)).astype(np.float32)
    nnx.jit(lambda layer, x: layer(x))(layer, x)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float64).var((0, 1)).astype(np.float32)
    np.testing.assert_allclose(layer.var[...], expected, rtol=1e-5)


def collectives(module, how, fast):
    """The number of collectives in the compiled value and gradient of a split batch."""
    named = how == "shard_map"
    run, state = training(
        layer_of(module, axis_name="batch" if named else None, use_fast_variance=fast)
    )
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    if named:
        run = jax.shard_map(
            lambda state, x, g: run_(state, x, g, None),
            mesh=mesh,
            in_specs=(ALL, SPLIT, SPLIT),
            out_specs=(SPLIT, SPLIT, ALL, ALL, ALL),
        )
        run_ = training(layer_of(module, axis_name="batch", use_fast_variance=fast))[0]
        args = (state, X, G)
    else:
        args = (state, *(jax.device_put(a, NamedSharding(mesh, SPLIT)) for a in (X, G)), None)
    text = jax.jit(run).lower(*args).compile().as_text()
    return len(re.findall(r" (?:all-reduce|all-gather|reduce-scatter|all-to-all)\(", text))


def test_no_more_collectives_than_nnx():
    assert collectives(fcg, "shard_map", True) <= collectives(nnx, "shard_map", True)
    assert collectives(fcg, "jit", False) <= collectives(nnx, "jit", False)
    # Taking the mean out before the squares costs one more where XLA splits the batch itself.
    assert collectives(fcg, "jit", True) <= collectives(nnx, "jit", True) + 1


@nnx.jit
def called(layers, x):
    return [layer(x) for layer in layers]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_running_statistics_are_those_of_nnx(dtype):
    layers = [layer_of(m, momentum=0.9, dtype=dtype) for m in (fcg, nnx)]
    for step in range(3):
        x = jax.random.normal(jax.random.key(step), (32, 6))
        ours, theirs = called(layers, x)
        np.testing.assert_allclose(ours, theirs, atol=3e-2 if dtype == jnp.bfloat16 else 1e-5)
    for name in ("mean", "var"):
        ours, theirs = (getattr(layer, name)[...] for layer in layers)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert ours.dtype == theirs.dtype == jnp.float32
    for layer in layers:
        layer.eval()
    ours, theirs = called(layers, x)
    np.testing.assert_allclose(ours, theirs, atol=3e-2 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.smoke
def test_a_batch_without_elements_leaves_the_running_statistics_alone():
    layer = layer_of(momentum=0.5)

    @nnx.jit
    def call(layer, x, mask):
        return layer(x, mask=mask)

    call(layer, X, MASK)
    before = [layer.mean[...], layer.var[...]]
    for x, mask in ((X, jnp.zeros(MASK.shape, bool)), (X[:0], None)):
        y = call(layer, x, mask)
        assert np.isfinite(y).all()
        np.testing.assert_array_equal([layer.mean[...], layer.var[...]], before)
    call(layer, X, MASK)
    assert (layer.mean[...] != before[0]).all()


def test_statistics_have_no_gradient():
    """As the layer, which writes them down; with the derivative that JAX takes as well."""
    config = NormConfig(NormAxes.of(3, (0, 1), 2), 1e-5, jnp.dtype("float32"), with_statistics=True)

    def loss(x):
        y, found = normalize(nnx.State({}), x, None, config)
        return jnp.sum(y**3), jnp.sum(jnp.sin(found.mean)) + jnp.sum(found.variance**2)

    def both(x):
        return sum(loss(x))

    def of_output(x):
        return loss(x)[0]

    np.testing.assert_array_equal(jax.grad(both)(X), jax.grad(of_output)(X))
    with fcg.use_autodiff():
        np.testing.assert_allclose(jax.grad(both)(X), jax.grad(of_output)(X), rtol=1e-5, atol=1e-6)


def test_a_batch_of_any_size_is_exported():
    """A symbolic size is no power of two, whatever it turns out to be."""
    graphdef, state = nnx.split(layer_of())

    def loss(state, x):
        return jnp.sum(nnx.merge(graphdef, state, copy=True)(x) ** 3)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    (size,) = jax.export.symbolic_shape("size")
    exported = jax.export.export(gradient)(state, jax.ShapeDtypeStruct((size, 2, 6), jnp.float32))
    found, expected = exported.call(state, X), gradient(state, X)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
