import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_customgrad.estimators.codebook.nearest_code import nearest_code


def brute_force(x, codes):
    x, codes = (np.asarray(a, np.float64) for a in (x, codes))
    return np.argmin(((x[..., None, :] - codes) ** 2).sum(-1), -1)


nearest_code = jax.jit(nearest_code, static_argnames="block")


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("block", [None, 1, 7, 37, 100])
def test_is_the_nearest_for_any_block(block):
    x, codes = random(5, 11, 3), random(37, 3, seed=1)
    indices = nearest_code(x, codes, block)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, brute_force(x, codes))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_half_precision_is_compared_in_float32(dtype):
    # In half precision |e|^2 - 2 x.e of these are all the same.
    codes = (100 + jnp.arange(8, dtype=jnp.float32)[:, None] * jnp.ones(4)).astype(dtype)
    x = codes[::-1]
    np.testing.assert_array_equal(nearest_code(x, codes), brute_force(x, codes))


def test_float64_stays():
    with jax.enable_x64(True):
        codes = 1 + jnp.arange(4.0)[:, None] * 1e-6
        np.testing.assert_array_equal(nearest_code(codes, codes), np.arange(4))


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_of_equal_codes_the_first(block):
    codes = jnp.array([[3.0], [1.0], [1.0], [-1.0], [-1.0], [1.0], [3.0]])
    x = jnp.array([[1.0], [-2.0], [0.0], [9.0], [2.0]])
    np.testing.assert_array_equal(nearest_code(x, codes, block), [1, 3, 1, 0, 0])


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("of_codes", [1e-30, 1.0, 1e30])
def test_tiny_and_huge(size, of_codes):
    x, codes = random(50, 3), random(9, 3, seed=1)
    wide = size * np.asarray(x, np.float64), of_codes * np.asarray(codes, np.float64)
    # Not by the differences, which lose the codes beside a huge x in float64 as well.
    expected = np.argmin((wide[1] ** 2).sum(-1) - 2 * wide[0] @ wide[1].T, -1)
    np.testing.assert_array_equal(nearest_code(size * x, of_codes * codes, 4), expected)


@pytest.mark.parametrize("offset", [1e3, -3e5, 1e30])
@pytest.mark.parametrize("beside", ["nothing", "padding", "unused codes"])
def test_a_common_offset_costs_no_digits(offset, beside):
    """The vectors, the codes, or both lie far from 0; beside them zeros, or codes near 0."""
    step = np.spacing(np.float32(abs(offset)))
    codes, x = (offset + 2**12 * step * np.asarray(random(n, 8, seed=n)) for n in (64, 500))
    if beside == "padding":
        x[::50] = 0
    if beside == "unused codes":
        codes[::2] = random(32, 8)
    x, codes = x.astype(np.float32), codes.astype(np.float32)
    np.testing.assert_array_equal(nearest_code(x, codes), brute_force(x, codes))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_has_no_nearest_code(bad):
    x, codes = random(6, 3), random(9, 3, seed=1)
    indices = nearest_code(x.at[2, 1].set(bad), codes, 4)
    np.testing.assert_array_equal(indices, nearest_code(x, codes).at[2].set(9))
    np.testing.assert_array_equal(nearest_code(x, codes.at[7, 0].set(bad), 4), np.full(6, 9))


def test_no_vectors_and_one_vector():
    codes = random(9, 3)
    assert nearest_code(jnp.zeros((0, 3)), codes).shape == (0,)
    assert nearest_code(jnp.zeros((4, 0, 3)), codes).shape == (4, 0)
    assert nearest_code(codes[4], codes) == 4


def test_under_vmap_and_scan():
    x, codes = random(3, 11, 4), random(3, 10, 4, seed=1)
    expected = np.stack([brute_force(*pair) for pair in zip(x, codes, strict=True)])
    np.testing.assert_array_equal(jax.vmap(lambda x, c: nearest_code(x, c, 4))(x, codes), expected)
    np.testing.assert_array_equal(
        jax.lax.map(lambda xc: nearest_code(*xc, 4), (x, codes)), expected
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(axis_type):
    x, codes = random(8, 3, 4), random(11, 4, seed=1)
    expected = brute_force(x, codes)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data", None, None)))
        codes = jax.device_put(codes, NamedSharding(mesh, P(None, "model")))
        indices = jax.jit(lambda x, codes: nearest_code(x, codes, 4))(x, codes)
        np.testing.assert_array_equal(indices, expected)
        assert indices.sharding.spec[0] == "data"


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map(check_vma):
    x, codes = random(16, 4), random(11, 4, seed=1)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    local = jax.shard_map(
        lambda x, codes: nearest_code(x, codes, 4),
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    np.testing.assert_array_equal(local(x, codes), brute_force(x, codes))


def test_there_is_never_an_array_of_all_distances():
    n, num_codes = 2048, 16384
    x, codes = jnp.zeros((n, 8)), jnp.zeros((num_codes, 8))
    compiled = jax.jit(lambda x, c: nearest_code(x, c, 64)).lower(x, codes).compile()
    # A block of 2048 x 64 is half a megabyte; all distances are 134.
    assert compiled.memory_analysis().temp_size_in_bytes < 4e6


@pytest.mark.parametrize("n", [4096, 16384])
def test_65536_codes_fit(n):
    args = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, 64), (65536, 64)))
    compiled = jax.jit(nearest_code).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64e6


@pytest.mark.smoke
def test_errors():
    with pytest.raises(ValueError, match=r"x has shape \(3, 4\) and codes \(5, 3\)"):
        nearest_code(jnp.zeros((3, 4)), jnp.zeros((5, 3)))
    with pytest.raises(ValueError, match="at least one code"):
        nearest_code(jnp.zeros((3, 4)), jnp.zeros((0, 4)))
    with pytest.raises(ValueError, match="block=0 must be a positive"):
        nearest_code(jnp.zeros((3, 4)), jnp.zeros((5, 4)), 0)
