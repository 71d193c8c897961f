"""What is kept of quantized operands, and what the backward makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flax_customgrad as fcg


def _fake_quant(a, axes, bits):
    """Fake quantization as it is usually written, with stop_gradient."""
    high = 2 ** (bits - 1) - 1
    s = jax.lax.stop_gradient(jnp.max(jnp.abs(a), axes, keepdims=True) / high)
    return a + jax.lax.stop_gradient(jnp.round(a / s) * s - a)


def _layer(residuals="quantized", bits=4, features=(64, 5)):
    return fcg.QuantLinear(
        *features,
        weight=fcg.FakeQuant(bits, axis=-1),
        activation=fcg.FakeQuant(bits),
        residuals=residuals,
        rngs=nnx.Rngs(0),
    )


def _x(*shape):
    return jax.random.normal(jax.random.key(1), shape)


def test_the_gradient_is_that_of_the_stop_gradient_form():
    layer, x = _layer(), _x(8, 64)

    def usual(layer, x):
        return _fake_quant(x, None, 4) @ _fake_quant(layer.kernel[...], 0, 4) + layer.bias[...]

    with jax.enable_x64(True):
        args = jax.tree.map(lambda a: a.astype(jnp.float64), (layer, x))

        @nnx.jit
        def gradients(layer, x):
            def of(f):
                return nnx.grad(lambda *a: (f(*a) ** 2).sum(), argnums=(0, 1))(layer, x)

            return of(lambda layer, x: layer(x)), of(usual)

        ours, theirs = gradients(*args)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), ours, theirs
        )


def test_second_derivatives_run_through_the_codes():
    layer, x = _layer(features=(8, 3)), _x(4, 8)

    def hessian_sum(f):
        return jax.jit(jax.grad(lambda x: (jax.grad(lambda x: (f(x) ** 3).sum())(x) ** 2).sum()))

    def usual(x):
        return _fake_quant(x, None, 4) @ _fake_quant(layer.kernel[...], 0, 4)

    np.testing.assert_allclose(hessian_sum(layer)(x), hessian_sum(usual)(x), rtol=1e-4)


def test_the_original_operands_stand_in_for_the_quantized_ones():
    layer, x = _layer("original", features=(8, 3)), _x(4, 8)

    @nnx.jit
    def value_and_gradient(layer, x):
        gradient = nnx.grad(lambda layer, x: layer(x).sum(), argnums=(0, 1))
        return layer(x), gradient(layer, x)

    y, (dlayer, dx) = value_and_gradient(layer, x)
    np.testing.assert_array_equal(y, value_and_gradient(_layer(features=(8, 3)), x)[0])
    g = jnp.ones((4, 3))
    np.testing.assert_allclose(dx, g @ layer.kernel[...].T, rtol=1e-6)
    np.testing.assert_allclose(dlayer.kernel[...], x.T @ g, rtol=1e-6)


def test_four_bits_keep_an_eighth():
    x = _x(32, 64)
    kept = fcg.residual_bytes(_layer(), x)
    float_kept = x.nbytes
    weights = 64 * 3 + 5 * 4 + 5 * 4  # codes of 5 columns in 3 bytes, scales, bias
    assert kept - weights <= float_kept / 7
    assert fcg.residual_bytes(_layer(bits=2), x) < kept
    assert fcg.residual_bytes(_layer(bits=8), x) - 64 * 5 <= float_kept / 4 + 64


def test_codes_are_what_a_scan_stacks_up():
    x = _x(256, 128)

    def temporary(layer):
        def deep(layer):
            return jax.lax.scan(lambda h, _: (layer(h), None), x, None, length=8)[0].sum()

        step = nnx.jit(nnx.grad(deep))
        return step.lower(layer).compile().memory_analysis().temp_size_in_bytes

    quantized = temporary(_layer(features=(128, 128)))
    assert quantized < temporary(_layer("original", features=(128, 128))) / 2
