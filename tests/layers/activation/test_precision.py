"""Half precision is computed in float32 and rounded once; parameters are summed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

HALF = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
ELEMENTS = 2**20


@HALF
def test_value_and_derivative_are_rounded_once(pointwise, dtype):
    def results(x, g):
        y, vjp = jax.vjp(pointwise.ours, x)
        return y, vjp(g)[0]

    x, g = (jax.random.normal(jax.random.key(i), (2000,), dtype) for i in range(2))
    half = jax.jit(results)(3 * x, g)
    with jax.enable_x64(True):
        full = results((3 * x).astype(jnp.float64), g.astype(jnp.float64))
    for a, b in zip(half, full, strict=True):
        assert a.dtype == dtype
        # Beside the one rounding what float32 loses where a formula cancels.
        tolerance = {"rtol": 0.51 * float(jnp.finfo(dtype).eps), "atol": 5e-7}
        np.testing.assert_allclose(np.asarray(a, np.float64), b, **tolerance)


def one_signed(dtype):
    x = jax.random.normal(jax.random.key(0), (1024, ELEMENTS // 1024), dtype)
    return x, jnp.abs(jax.random.normal(jax.random.key(1), x.shape)).astype(dtype)


@HALF
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_slope_of_prelu(dtype, param_dtype):
    """A million terms of one sign: nnx loses 60% of the sum in bfloat16, and all in float16."""
    x, g = one_signed(dtype)
    layer = fcg.PReLU(param_dtype=param_dtype)

    def gradient(layer):
        def loss(layer, x, g):
            return jnp.sum((layer(x) * g).astype(jnp.float32))

        return nnx.jit(nnx.grad(loss))(layer, x, g).negative_slope[...]

    got = gradient(layer)
    x64, g64 = np.asarray(x, np.float64), np.asarray(g, np.float64)
    expected = np.sum(np.where(x64 < 0, x64 * g64, 0))
    assert got.dtype == param_dtype
    np.testing.assert_allclose(float(got), expected, rtol=1e-6 if got.dtype == "float32" else 3e-3)
    with np.errstate(invalid="ignore"):
        theirs = float(gradient(nnx.PReLU(param_dtype=param_dtype)))
    assert not abs(theirs - expected) < 0.3 * abs(expected)


@HALF
def test_a_parameter_of_a_function(parametrized, dtype):
    x, g = one_signed(dtype)
    p = jnp.full((x.shape[-1],), 0.5)

    def gradient(x, g):
        return jax.jit(jax.grad(lambda p, x, g: jnp.sum(parametrized.ours(x, p) * g)))(p, x, g)

    got = gradient(x, g)
    with jax.enable_x64(True):
        expected = gradient(x.astype(jnp.float64), g.astype(jnp.float64))
    np.testing.assert_allclose(got, expected, rtol=2e-6)
