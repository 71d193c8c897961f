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
    @jax.jit
    def results(x, g):
        def value_and_cotangent(f):
            y, vjp = jax.vjp(f, x)
            return y, vjp(g)[0]

        return {name: value_and_cotangent(pair.ours) for name, pair in pointwise.items()}

    x, g = (jax.random.normal(jax.random.key(i), (2000,), dtype) for i in range(2))
    half = results(3 * x, g)
    with jax.enable_x64(True):
        full = results((3 * x).astype(jnp.float64), g.astype(jnp.float64))
    for name in pointwise:
        for a, b in zip(half[name], full[name], strict=True):
            assert a.dtype == dtype
            # Beside the one rounding what float32 loses where a formula cancels.
            tolerance = {"rtol": 0.51 * float(jnp.finfo(dtype).eps), "atol": 1e-6}
            np.testing.assert_allclose(np.asarray(a, np.float64), b, **tolerance, err_msg=name)


def one_signed(dtype):
    x = jax.random.normal(jax.random.key(0), (1024, ELEMENTS // 1024), dtype)
    return x, jnp.abs(jax.random.normal(jax.random.key(1), x.shape)).astype(dtype)


@HALF
def test_the_slope_of_prelu(dtype):
    """A million terms of one sign: nnx loses 60% of the sum in bfloat16, and all in float16."""
    x, g = one_signed(dtype)
    layers = [
        m.PReLU(param_dtype=param_dtype)
        for param_dtype in (jnp.float32, jnp.bfloat16)
        for m in (fcg, nnx)
    ]

    @nnx.jit
    def gradients(layers, x, g):
        def loss(layer):
            return jnp.sum((layer(x) * g).astype(jnp.float32))

        return [nnx.grad(loss)(layer).negative_slope[...] for layer in layers]

    x64, g64 = np.asarray(x, np.float64), np.asarray(g, np.float64)
    expected = np.sum(np.where(x64 < 0, x64 * g64, 0))
    wide, their_wide, narrow, their_narrow = gradients(layers, x, g)
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(float(wide), expected, rtol=1e-6)
    np.testing.assert_allclose(float(narrow), expected, rtol=3e-3)
    for theirs in (their_wide, their_narrow):
        assert not abs(float(theirs) - expected) < 0.3 * abs(expected)


@HALF
def test_a_parameter_of_a_function(parametrized, dtype):
    x, g = one_signed(dtype)
    p = jnp.full((x.shape[-1],), 0.5)

    @jax.jit
    def gradients(p, x, g):
        def total(p, f):
            return jnp.sum(f(x, p) * g)

        return {name: jax.grad(total)(p, pair.ours) for name, pair in parametrized.items()}

    got = gradients(p, x, g)
    with jax.enable_x64(True):
        expected = gradients(p, x.astype(jnp.float64), g.astype(jnp.float64))
    for name in parametrized:
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-6, err_msg=name)


@pytest.mark.parametrize("f", [fcg.relu, fcg.relu6, fcg.hard_tanh], ids=lambda f: f.__name__)
def test_what_selects_numbers_widens_none(f):
    def value_and_gradient(x):
        y, pull_back = jax.vjp(f, x)
        return y, pull_back(y)

    text = jax.jit(value_and_gradient).lower(jnp.ones((4, 8), jnp.bfloat16)).as_text()
    assert "tensor<4x8xf32>" not in text
