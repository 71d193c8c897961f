import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_customgrad as fcg
from flax_customgrad.catalogue import find

HALF = [jnp.float16, jnp.bfloat16]
DTYPES = [*HALF, jnp.float32, jnp.float64]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def random(*shape, seed=0, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64).astype(dtype)


def pulled(estimator, z, q, g):
    y, pull = jax.vjp(estimator, z, q)
    return y, *pull(g)


def rotated(z, q, g):
    return pulled(fcg.rotation_trick, z, q, g)[1]


def norm(x):
    """Without overflow, as np.hypot."""
    return np.hypot.reduce(np.asarray(x, np.float64), -1)


@pytest.mark.parametrize("name", ["straight_through_estimator", "rotation_trick"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_value_is_q_to_the_bit(name, dtype):
    z, q, g = (random(50, 6, seed=i, dtype=dtype) for i in range(3))
    y, dz, dq = pulled(getattr(fcg, name), z, q, g)
    assert y.dtype == dz.dtype == dtype
    np.testing.assert_array_equal(y, q)
    np.testing.assert_array_equal(dq, np.zeros_like(q))


@pytest.mark.parametrize("name", ["straight_through_estimator", "rotation_trick"])
def test_the_gradient_is_its_formula(name):
    z, q, g = (random(200, 7, seed=i) for i in range(3))
    _, dz, _ = pulled(getattr(fcg, name), z, q, g)
    np.testing.assert_allclose(dz, find(name).formula(z, q, g)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["straight_through_estimator", "rotation_trick"])
def test_dtypes_promote(name):
    z, q = random(3, 4, dtype=jnp.bfloat16), random(3, 4, dtype=jnp.float32)
    y, dz, _ = pulled(getattr(fcg, name), z, q, q)
    assert (y.dtype, dz.dtype) == (jnp.float32, jnp.bfloat16)


def tolerance(dtype):
    return max(8 * float(jnp.finfo(dtype).eps), 1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 6])
def test_the_gradient_is_lambda_times_as_long(dtype, features):
    z, q, g = (random(100, features, seed=i, dtype=dtype) for i in range(3))
    ratio = norm(rotated(z, q, g)) * norm(z) / norm(q) / norm(g)
    np.testing.assert_allclose(ratio, 1, rtol=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [0.0, 1e-16, 1e-7, 3e-7, 1e-6, 1e-3])
def test_opposite_vectors(dtype, noise):
    z, g = random(100, 6, dtype=dtype), random(100, 6, seed=1, dtype=dtype)
    q = (-2 * z.astype(jnp.float64) * (1 + noise * random(100, 6, seed=2))).astype(dtype)
    dz = rotated(z, q, g)
    np.testing.assert_allclose(norm(dz) * norm(z) / norm(q) / norm(g), 1, rtol=tolerance(dtype))
    # The transpose of what takes u to v takes v to u.
    back = rotated(z, q, (q / norm(q)[:, None]).astype(dtype))
    expected = np.asarray(z, np.float64) * (norm(q) / norm(z) ** 2)[:, None]
    np.testing.assert_allclose(back, expected, rtol=0, atol=4 * tolerance(dtype))


def test_exactly_opposite_vectors_are_a_reflection():
    z, g = random(20, 6), random(20, 6, seed=1)
    u = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    expected = g - 2 * u * jnp.sum(u * g, -1, keepdims=True)
    np.testing.assert_allclose(rotated(z, -z, g), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros(dtype):
    x, g, zeros = random(5, 4, dtype=dtype), random(5, 4, seed=1, dtype=dtype), jnp.zeros((5, 4))
    zeros = zeros.astype(dtype)
    np.testing.assert_array_equal(rotated(zeros, x, g), g)
    np.testing.assert_array_equal(rotated(zeros, zeros, g), g)
    np.testing.assert_array_equal(rotated(x, zeros, g), zeros)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [1e-33, 1e-20, 1e20, 1e36])
def test_the_size_of_both_does_not_matter(dtype, size):
    z, q, g = (random(50, 4, seed=i, dtype=dtype) for i in range(3))
    expected = rotated(z.astype(jnp.float64), q.astype(jnp.float64), g.astype(jnp.float64))
    power = 2.0 ** np.round(np.log2(size))
    scaled = rotated((z * power).astype(dtype), (q * power).astype(dtype), g)
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=4 * tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("of_z", "of_q"), [(1e-30, 1e30), (1e30, 1e-30), (1e-4, 1e4), (6e4, 1)])
def test_never_nan(dtype, of_z, of_q):
    z, q, g = (random(50, 4, seed=i) for i in range(3))
    dz = rotated((z * of_z).astype(dtype), (q * of_q).astype(dtype), g.astype(dtype))
    finite = jnp.isfinite((z * of_z).astype(dtype)).all() & jnp.isfinite((q * of_q).astype(dtype))
    assert not (jnp.isnan(dz) & finite.all()).any()


def test_no_gradient_stays_none_however_far_it_is_stretched():
    z, q = random(50, 4, dtype=jnp.float32), random(50, 4, seed=1, dtype=jnp.float32)
    dz = rotated(z * 1e-30, q * 1e30, jnp.zeros_like(z))
    np.testing.assert_array_equal(dz, jnp.zeros_like(z))


def test_nan_stays_nan():
    z, q, g = random(3, 4), random(3, 4, seed=1), random(3, 4, seed=2)
    assert jnp.isnan(rotated(z.at[1, 1].set(jnp.nan), q, g)[1]).all()
    assert jnp.isnan(rotated(z, q.at[1, 1].set(jnp.nan), g)[1]).all()


@pytest.mark.parametrize("name", ["straight_through_estimator", "rotation_trick"])
def test_empty_and_errors(name):
    estimator = getattr(fcg, name)
    assert pulled(estimator, *(jnp.zeros((0, 4)),) * 3)[1].shape == (0, 4)
    with pytest.raises(ValueError, match=rf"{name}: z has shape \(3, 4\)"):
        estimator(jnp.zeros((3, 4)), jnp.zeros(4))
