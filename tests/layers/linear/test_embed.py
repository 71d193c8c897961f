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


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.uint8, jnp.int16], ids=str)
def test_ids_of_any_integer_type_and_out_of_range(dtype):
    ids = jnp.array([0, 4, 5, 100, 2, 2], dtype)
    if jnp.issubdtype(dtype, jnp.signedinteger):
        ids = jnp.concatenate([ids, jnp.array([-1, -5, -6, -100], dtype)])
    ours, theirs = pair(5, 3)
    np.testing.assert_array_equal(ours(ids), theirs(ids))
    assert np.isnan(ours(ids)[2:4]).all()
    np.testing.assert_allclose(gradient(ours, ids), gradient(theirs, ids), rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("size", [1, 5])
def test_any_shape_of_ids(shape, size):
    ids = jnp.zeros(shape, jnp.int32)
    ours, theirs = pair(size, 3)
    if (shape, size) == ((), 1):  # which nnx refuses
        np.testing.assert_array_equal(ours(ids), ours.embedding[0])
        return
    np.testing.assert_array_equal(ours(ids), theirs(ids))
    np.testing.assert_allclose(gradient(ours, ids), gradient(theirs, ids), rtol=1e-6)


def test_one_row_whatever_the_id():
    ours, theirs = pair(1, 3)
    np.testing.assert_array_equal(ours(jnp.array([0, 7])), theirs(jnp.array([0, 7])))


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (0, 4)], ids=str)
def test_attend(shape):
    query = jax.random.normal(jax.random.key(0), shape)
    ours, theirs = pair(5, 4)
    np.testing.assert_array_equal(ours.attend(query), theirs.attend(query))
    a, b = (
        nnx.grad(lambda m, q: jnp.sum(jnp.sin(m.attend(q))), argnums=(0, 1))(m, query)
        for m in (ours, theirs)
    )
    np.testing.assert_allclose(a[0].embedding[...], b[0].embedding[...], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-5, atol=1e-6)


def test_a_tied_table_sums_both_gradients():
    def loss(m, ids):
        return jnp.sum(m.attend(m(ids)) ** 2)

    ids = jnp.array([1, 2, 2])
    a, b = (nnx.grad(loss)(m, ids).embedding[...] for m in pair(5, 4))
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
