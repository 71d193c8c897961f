"""Half-precision residuals: as bits where XLA would widen them, without losing a derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_customgrad as fcg
from flax_customgrad.contract.residual_storage import inspecting_residuals, restore, store

HALF = [jnp.bfloat16, jnp.float16]


@fcg.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (cube(x), x), lambda x, g: (3 * g * x * x,))


@pytest.mark.parametrize("dtype", [*HALF, jnp.float32, jnp.int32])
def test_what_is_kept_comes_back(dtype):
    x = jnp.array([-2.5, 0.0, 3.0, jnp.inf]).astype(dtype)
    back = jax.jit(lambda x: restore(store(x)))(x)
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(back, x)
    assert store(x).bits is None  # nothing to gain outside of a trace


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_second_derivatives_pass_through(dtype, wrap):
    x = jnp.array([0.5, 2.0], dtype)
    second = jax.vmap(jax.grad(jax.grad(cube)))
    got = jax.vmap(second)(x[None])[0] if wrap is jax.vmap else wrap(second)(x)
    np.testing.assert_array_equal(got, 6 * x)


@pytest.mark.parametrize("dtype", HALF)
def test_a_scan_stacks_no_wider_array(dtype):
    x = jnp.ones((256, 256), dtype)

    def loss(x):
        y, _ = jax.lax.scan(lambda c, _: (cube(c), None), x, None, length=8)
        return jnp.sum(y.astype(jnp.float32))

    memory = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 10.5 * x.nbytes


def test_residuals_are_listed_as_they_are():
    x = jnp.ones((4, 3), jnp.bfloat16)
    assert [(r.dtype, r.is_argument) for r in fcg.residuals(cube, x)] == [(jnp.bfloat16, True)]
    with inspecting_residuals():
        assert jax.jit(lambda x: store(x).bits is None)(x)
