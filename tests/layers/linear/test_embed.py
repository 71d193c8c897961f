"""What is particular to Embed: ids out of range, a table of one row, attend, a sharded table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import flax_customgrad as fcg


def pair(*args, **kwargs):
    return [m.Embed(*args, **kwargs, rngs=nnx.Rngs(0)) for m in (fcg, nnx)]


def gradient(layer, ids):
    return nnx.grad(lambda m: jnp.nansum(jnp.sin(m(ids))))(layer).embedding[...]


@jax.jit
def looked_up(layers, ids):
    """What each layer gives for each of some ids, and the gradient of its table."""
    return [[(m(i), gradient(m, i)) for i in ids] for m in layers]


def agree(layers, ids):
    ours, theirs = looked_up(layers, ids)
    for (y, dtable), (expected, slope) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_allclose(dtable, slope, rtol=1e-6)
    return ours


def test_ids_of_any_integer_type_and_out_of_range():
    ids = [jnp.array([0, 4, 5, 100, 2, 2, -1, -5, -6, -100], d) for d in ("int8", "int16", "int32")]
    ids.append(jnp.array([0, 4, 5, 100, 2, 2], jnp.uint8))
    for y, dtable in agree(pair(5, 3), ids):
        assert np.isnan(y[2:4]).all()
        assert np.isfinite(dtable).all()


@pytest.mark.parametrize("size", [8, 300], ids=["many ids", "few ids"])
def test_a_table_in_half_precision_is_summed_in_float32(size):
    ids = jnp.array([[7, 0, 7, -1, size], [-1, -size, 7, -size - 1, 5000]], jnp.int16)
    layer = fcg.Embed(size, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    g = jax.random.normal(jax.random.key(0), (*ids.shape, 3), jnp.bfloat16)
    graphdef, state = nnx.split(layer)
    _, pull_back = jax.vjp(lambda state: nnx.merge(graphdef, state)(ids), state)
    (found,) = jax.tree.leaves(pull_back(g))
    wide = jnp.zeros((size, 3)).at[ids.astype(int)].add(g.astype(jnp.float32), mode="drop")
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA widens the table itself")
def test_few_ids_need_no_table_in_float32():
    table = jax.ShapeDtypeStruct((4096, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((32,), jnp.int32)

    def gradient(table, ids):
        layer = fcg.Embed(4096, 64, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        layer.embedding[...] = table
        return nnx.grad(lambda m: jnp.sum(jnp.sin(m(ids))))(layer).embedding[...]

    memory = jax.jit(gradient).lower(table, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4096 * 64 / 4


@pytest.mark.parametrize("size", [1, 5])
def test_any_shape_of_ids(size):
    ids = [jnp.zeros(shape, jnp.int32) for shape in ((), (0,), (2, 0), (2, 3, 1))]
    layers = pair(size, 3)
    if size == 1:  # nnx refuses a single id
        np.testing.assert_array_equal(layers[0](ids[0]), layers[0].embedding[0])
        ids = ids[1:]
    agree(layers, ids)


@pytest.mark.smoke
def test_one_row_whatever_the_id():
    ours, theirs = pair(1, 3)
    np.testing.assert_array_equal(ours(jnp.array([0, 7])), theirs(jnp.array([0, 7])))


def test_attend():
    @jax.jit
    def outcomes(layers, queries):
        def loss(m, q):
            return jnp.sum(jnp.sin(m.attend(q)))

        return [
            [(m.attend(q), nnx.grad(loss, argnums=(0, 1))(m, q)) for q in queries] for m in layers
        ]

    shapes = (4,), (2, 4), (2, 3, 4), (0, 4)
    queries = [jax.random.normal(jax.random.key(0), shape) for shape in shapes]
    for (y, grads), (expected, slopes) in zip(*outcomes(pair(5, 4), queries), strict=True):
        np.testing.assert_array_equal(y, expected)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(slopes), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_tied_table_sums_both_gradients():
    def loss(m, ids):
        return jnp.sum(m.attend(m(ids)) ** 2)

    ids = jnp.array([1, 2, 2])
    a, b = (nnx.jit(nnx.grad(loss))(m, ids).embedding[...] for m in pair(5, 4))
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_table_sharded_over_an_explicit_mesh():
    ids = jnp.arange(8) % 5
    plain = fcg.Embed(16, 4, rngs=nnx.Rngs(0))
    expected = gradient(plain, ids)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
        layer = nnx.clone(plain)
        layer.embedding.set_raw_value(
            jax.device_put(plain.embedding[...], PartitionSpec("data", None))
        )
        split = jax.device_put(ids, PartitionSpec("data"))
        got = nnx.jit(
            nnx.grad(lambda m: jnp.sum(jnp.sin(m(split, out_sharding=PartitionSpec("data")))))
        )(layer).embedding[...]
        assert jax.typeof(got).sharding.spec == PartitionSpec("data", None)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
