"""The sum over rows in the gradient of a kernel: its value, and what is turned for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.numerics.row_products import sum_over_rows


@pytest.fixture(autouse=True)
def _one_cpu(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def _normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("lhs", "rhs", "lhs_rows", "rhs_rows"),
    [
        ((160, 24), (160, 8), [0], [0]),
        ((160, 8), (160, 24), [0], [0]),
        ((8, 20, 24), (8, 20, 8), [0, 1], [0, 1]),
        ((8, 20, 3, 8), (8, 20, 2, 4), [0, 1], [0, 1]),
        ((8, 3, 20, 8), (8, 20, 4), [0, 2], [0, 1]),
        ((20, 24), (20,), [0], [0]),
        ((20,), (20,), [0], [0]),
        ((0, 24), (0, 8), [0], [0]),
    ],
)
def test_it_is_the_product(dtype, lhs, rhs, lhs_rows, rhs_rows):
    a, b = _normal(*lhs, dtype=dtype), _normal(*rhs, seed=1, dtype=dtype)
    found = jax.jit(lambda a, b: sum_over_rows(a, b, lhs_rows, rhs_rows, jnp.float32))(a, b)
    expected = np.tensordot(np.float64(a), np.float64(b), (lhs_rows, rhs_rows))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_smaller_factor_is_turned():
    def is_turned(lhs, rhs):
        program = jax.jit(lambda a, b: sum_over_rows(a, b, [0, 1], [0, 1], jnp.float32))
        return "transpose" in program.lower(jnp.ones(lhs), jnp.ones(rhs)).as_text()

    assert is_turned((4, 32, 64), (4, 32, 16))
    assert not is_turned((4, 32, 16), (4, 32, 64))
    assert not is_turned((2, 4, 64), (2, 4, 16))  # the result is the larger one


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch", [(144,), (3, 48)])
@pytest.mark.parametrize(("features", "others"), [(40, 12), (12, 40)])
def test_gradients_of_layers_are_those_of_float64(dtype, batch, features, others):
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    x, g = _normal(*batch, features, dtype=dtype), _normal(*batch, others, seed=1, dtype=dtype)
    rows = list(range(len(batch)))
    expected = np.tensordot(np.float64(x), np.float64(g), (rows, rows))

    def gradient(layer):
        graphdef, params = nnx.split(layer)
        call = lambda params: nnx.merge(graphdef, params)(x)  # noqa: E731
        return jax.jit(lambda g: jax.vjp(call, params)[1](g)[0])(g)["kernel"][...]

    made = {"param_dtype": dtype, "rngs": nnx.Rngs(0)}
    for layer in (
        fcg.Linear(features, others, **made),
        fcg.LinearGeneral(features, others, **made),
        fcg.Conv(features, others, (1,), **made) if len(batch) == 2 else None,
    ):
        if layer is not None:
            found = np.float64(gradient(layer)).reshape(expected.shape)
            np.testing.assert_allclose(
                found, expected, rtol=0, atol=tolerance * np.abs(expected).max()
            )


def test_a_batch_of_any_size_is_exported():
    graphdef, params = nnx.split(fcg.Linear(24, 4, rngs=nnx.Rngs(0)))

    def loss(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x) ** 2)

    rows = jax.export.symbolic_shape("n")
    args = params, jax.ShapeDtypeStruct((*rows, 24), jnp.float32)
    exported = jax.export.export(jax.jit(jax.grad(loss)))(*args)
    x = _normal(96, 24)
    found = exported.call(params, x)["kernel"][...]
    np.testing.assert_allclose(found, jax.grad(loss)(params, x)["kernel"][...], rtol=1e-4)


def test_second_derivatives_and_forward_mode():
    layer, x = fcg.Linear(24, 4, rngs=nnx.Rngs(0)), _normal(96, 24)
    graphdef, params = nnx.split(layer)

    def loss(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)))

    def squared(params):
        return sum(jnp.sum(a**2) for a in jax.tree.leaves(jax.grad(loss)(params)))

    second = jax.grad(squared)(params)
    along = jax.jvp(jax.grad(loss), (params,), (jax.grad(loss)(params),))[1]
    for a, b in zip(jax.tree.leaves(second), jax.tree.leaves(along), strict=True):
        np.testing.assert_allclose(a, 2 * b, rtol=1e-3, atol=1e-4)
