import functools

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


def random(n=100, features=6, seed=0, dtype=jnp.float64):
    return np.random.default_rng(seed).standard_normal((n, features)).astype(dtype)


# Compiled once for each shape and dtype: the tests share one shape.
@functools.partial(jax.jit, static_argnums=0)
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
    z, q, g = (random(seed=i, dtype=dtype) for i in range(3))
    y, dz, dq = pulled(getattr(fcg, name), z, q, g)
    assert y.dtype == dz.dtype == dtype
    np.testing.assert_array_equal(y, q)
    np.testing.assert_array_equal(dq, np.zeros_like(q))


@pytest.mark.parametrize("name", ["straight_through_estimator", "rotation_trick"])
def test_the_gradient_is_its_formula(name):
    z, q, g = (random(seed=i) for i in range(3))
    _, dz, _ = pulled(getattr(fcg, name), z, q, g)
    expected, _ = jax.jit(find(name).formula)(z, q, g)
    np.testing.assert_allclose(dz, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["straight_through_estimator", "rotation_trick"])
def test_dtypes_promote(name):
    z, q = random(dtype=jnp.bfloat16), random(dtype=jnp.float32)
    y, dz, _ = pulled(getattr(fcg, name), z, q, q)
    assert (y.dtype, dz.dtype) == (jnp.float32, jnp.bfloat16)


def tolerance(dtype):
    return max(8 * float(jnp.finfo(dtype).eps), 1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 6])
def test_the_gradient_is_lambda_times_as_long(dtype, features):
    z, q, g = (random(features=features, seed=i, dtype=dtype) for i in range(3))
    ratio = norm(rotated(z, q, g)) * norm(z) / norm(q) / norm(g)
    np.testing.assert_allclose(ratio, 1, rtol=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [0.0, 1e-14, 1e-10, 1e-7, 1e-6, 1e-4, 1e-2, 1.0])
def test_vectors_that_are_near_each_other(dtype, noise):
    """As after the replacement of dead codes, which are vectors of the batch."""
    z, g = random(dtype=dtype), random(seed=1, dtype=dtype)
    q = (1.5 * z.astype(np.float64) * (1 + noise * random(seed=2))).astype(dtype)
    expected, _ = find("rotation_trick").formula(*(a.astype(np.float64) for a in (z, q, g)))
    error = norm(rotated(z, q, g).astype(np.float64) - expected) / norm(expected)
    assert error.max() < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [0.0, 1e-16, 1e-7, 3e-7, 1e-6, 1e-3])
def test_opposite_vectors(dtype, noise):
    z, g = random(dtype=dtype), random(seed=1, dtype=dtype)
    q = (-2 * z.astype(np.float64) * (1 + noise * random(seed=2))).astype(dtype)
    dz = rotated(z, q, g)
    np.testing.assert_allclose(norm(dz) * norm(z) / norm(q) / norm(g), 1, rtol=tolerance(dtype))
    # The transpose of what takes u to v takes v to u.
    back = rotated(z, q, (q.astype(np.float64) / norm(q)[:, None]).astype(dtype))
    expected = np.asarray(z, np.float64) * (norm(q) / norm(z) ** 2)[:, None]
    np.testing.assert_allclose(back, expected, rtol=0, atol=4 * tolerance(dtype))


def test_exactly_opposite_vectors_are_a_reflection():
    z, g = random(), random(seed=1)
    u = z / np.linalg.norm(z, axis=-1, keepdims=True)
    expected = g - 2 * u * np.sum(u * g, -1, keepdims=True)
    np.testing.assert_allclose(rotated(z, -z, g), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros(dtype):
    x, g = random(dtype=dtype), random(seed=1, dtype=dtype)
    zeros = np.zeros_like(x)
    np.testing.assert_array_equal(rotated(zeros, x, g), g)
    np.testing.assert_array_equal(rotated(zeros, zeros, g), g)
    np.testing.assert_array_equal(rotated(x, zeros, g), zeros)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [1e-33, 1e-20, 1e20, 1e36])
def test_the_size_of_both_does_not_matter(dtype, size):
    z, q, g = (random(seed=i, dtype=dtype) for i in range(3))
    expected = rotated(*(a.astype(np.float64) for a in (z, q, g)))
    power = 2.0 ** np.round(np.log2(size))
    scaled = rotated(*((a.astype(np.float64) * power).astype(dtype) for a in (z, q)), g)
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=4 * tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("of_z", "of_q"), [(1e-30, 1e30), (1e30, 1e-30), (1e-4, 1e4), (6e4, 1)])
def test_never_nan(dtype, of_z, of_q):
    z, q, g = (random(seed=i) for i in range(3))
    with np.errstate(over="ignore"):
        z, q, g = ((a * size).astype(dtype) for a, size in ((z, of_z), (q, of_q), (g, 1)))
    finite = np.isfinite(z.astype(np.float64)).all() & np.isfinite(q.astype(np.float64)).all()
    assert not (np.isnan(np.float64(rotated(z, q, g))) & finite).any()


def test_no_gradient_stays_none_however_far_it_is_stretched():
    z, q = random(dtype=np.float32), random(seed=1, dtype=np.float32)
    dz = rotated(z * np.float32(1e-30), q * np.float32(1e30), np.zeros_like(z))
    np.testing.assert_array_equal(dz, np.zeros_like(z))


def test_nan_stays_nan():
    z, q, g = (random(seed=i) for i in range(3))
    some = np.where(np.arange(600).reshape(100, 6) == 7, np.nan, 0)
    assert np.isnan(rotated(z + some, q, g)[1]).all()
    assert np.isnan(rotated(z, q + some, g)[1]).all()


@pytest.mark.parametrize("name", ["straight_through_estimator", "rotation_trick"])
def test_empty_and_errors(name):
    estimator = getattr(fcg, name)
    assert pulled(estimator, *(jnp.zeros((0, 4)),) * 3)[1].shape == (0, 4)
    with pytest.raises(ValueError, match=rf"{name}: z has shape \(3, 4\)"):
        estimator(jnp.zeros((3, 4)), jnp.zeros(4))
