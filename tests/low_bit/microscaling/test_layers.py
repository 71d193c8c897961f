"""MXLinear and NVFP4Linear: outputs, what is kept, noise, bad arguments."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.low_bit.microscaling.nvfp4_linear import NVFP4

RNG = np.random.default_rng(0)
X = RNG.standard_normal((8, 20), np.float32)
G = RNG.standard_normal((8, 6), np.float32)


def mx(**kwargs):
    return fcg.MXLinear(20, 6, **{"block": 8, "rngs": nnx.Rngs(0), **kwargs})


def nvfp4(**kwargs):
    return fcg.NVFP4Linear(20, 6, **{"stochastic_rounding": False, "rngs": nnx.Rngs(0), **kwargs})


LAYERS = pytest.mark.parametrize("make", [mx, nvfp4])


@nnx.jit
def outputs_and_gradients(layer, x=X, g=G):
    """Output, and the gradients of kernel, bias and x."""
    x, g = jnp.asarray(x), jnp.asarray(g)

    def total(layer, x):
        y = layer(x)
        return jnp.sum(y.astype(g.dtype) * g), y

    (dlayer, dx), y = nnx.grad(total, argnums=(0, 1), has_aux=True)(layer, x)
    return y, dlayer.kernel[...], dlayer.bias[...], dx


def same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), **tolerance)


def mx_by_numpy(x, element, size):
    """Blocks along the last axis."""
    y = np.empty(x.shape)
    for k in range(0, x.shape[-1], size):
        block = np.float64(x[..., k : k + size])
        most = float(ml_dtypes.finfo(element).max)
        scale = 2 ** np.ceil(np.log2(np.abs(block).max(-1, keepdims=True) / most))
        y[..., k : k + size] = np.float32(block / scale).astype(element) * scale
    return y


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_the_output_is_the_product_of_what_was_rounded(name):
    layer = mx(format=name)
    element = {"mxfp8": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float4_e2m1fn}[name]
    w = np.asarray(layer.kernel[...])
    expected = mx_by_numpy(X, element, 8) @ mx_by_numpy(w.T, element, 8).T
    np.testing.assert_allclose(jax.jit(layer)(X), expected, rtol=2e-6, atol=1e-6)


def test_weights_of_nvfp4_are_the_same_forward_and_backward():
    """An input and a cotangent that are exact in the format show the weights."""
    layer = nvfp4()
    eye = np.eye(20, dtype=np.float32)
    y, _, _, dx = map(np.asarray, outputs_and_gradients(layer, eye, eye[:, :6]))
    np.testing.assert_allclose(dx[:6].T, y, rtol=1e-6)
    assert np.abs(y - np.asarray(layer.kernel[...])).max() > 1e-3


@LAYERS
def test_codes_are_kept_and_the_gradients_are_those_of_the_input(make):
    same(
        outputs_and_gradients(make()),
        outputs_and_gradients(make(residuals="original")),
        rtol=1e-5,
        atol=1e-6,
    )

    def kept(size, **kwargs):
        layer = make(use_bias=False, **kwargs)
        graphdef, params, other = nnx.split(layer, nnx.Param, ...)
        x = jax.ShapeDtypeStruct((size, 20), jnp.float32)

        def call(params, x):
            return nnx.merge(graphdef, params, other)(jnp.exp(x))

        # jnp.exp keeps its output, which nothing else holds.
        return fcg.residual_bytes(call, params, x) - 4 * size * 20

    if make is mx:
        assert kept(64) == 64 * 20 + 8 * 20
        assert kept(64, format="mxfp4") == 64 * 10 + 8 * 20
    else:
        assert kept(64) == 64 * 10 + 4 * 20 + 4


def test_leading_axes_are_rows():
    layer = mx()
    y, *grads, dx = map(np.asarray, outputs_and_gradients(layer))
    other = outputs_and_gradients(layer, X.reshape(2, 4, 20), G.reshape(2, 4, 6))
    same((y.reshape(2, 4, 6), *grads, dx.reshape(2, 4, 20)), other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(layer)(X[0]), y[0], rtol=1e-6)


@LAYERS
def test_half_precision_is_rounded_once(make):
    g = np.sign(G)
    y, *grads = outputs_and_gradients(make(dtype=jnp.bfloat16), X, g)
    assert (y.dtype, grads[0].dtype) == (jnp.bfloat16, jnp.float32)
    expected = outputs_and_gradients(make(), X, g)
    same([y], [expected[0]], rtol=2**-8)
    same(grads, expected[1:], rtol=1e-5, atol=1e-6)
    layer = make(preferred_element_type=jnp.float32, dtype=jnp.bfloat16)
    assert jax.eval_shape(layer, jnp.asarray(X)).dtype == jnp.float32


@LAYERS
def test_extreme_and_absent_values(make):
    layer = make()
    half = jnp.float16 if make is mx else jnp.bfloat16
    large = float(jnp.finfo(half).max) / 10
    for dtype, size in ((half, large), (jnp.float32, 3e37), (jnp.float32, 1e-37)):
        found = outputs_and_gradients(layer, (size * np.sign(X)).astype(dtype))
        assert all(np.isfinite(np.float32(a)).all() for a in found)
        assert np.abs(np.float32(found[1])).max() > 0.5 * size
    zeros = np.zeros((8, 20), np.float32), np.zeros((8, 6), np.float32)
    assert not any(np.asarray(a).any() for a in outputs_and_gradients(layer, *zeros))
    empty = outputs_and_gradients(layer, *(a[:0] for a in zeros))
    assert [a.shape for a in empty] == [(0, 6), (20, 6), (6,), (0, 20)]
    assert not np.asarray(empty[1]).any()
    for bad in (np.inf, np.nan):
        x, g = X.copy(), G.copy()
        x[3, 2], g[3, 2] = bad, bad
        y, dkernel, _, dx = map(np.asarray, outputs_and_gradients(layer, x))
        assert np.isnan(y[3]).all()
        assert np.isnan(dkernel[2]).all()
        assert np.isfinite(dx).all()
        assert np.isfinite(y[0]).all() == (make is mx)
        assert np.isnan(np.asarray(outputs_and_gradients(layer, X, g)[3])[3]).all()


def test_stochastic_rounding_is_right_on_average():
    layer = nvfp4(stochastic_rounding=True, hadamard=False)
    # Every block of the gradient has the same largest element, so that no scale is rounded.
    g = np.clip(G, -1.5, 1.5)
    g[0], g[:, 0] = 1.5, -1.5

    @nnx.split_rngs(splits=2000)
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}),))
    def draws(layer):
        dlayer, dx = nnx.grad(lambda m, x: jnp.sum(m(x) * g), argnums=(0, 1))(layer, jnp.asarray(X))
        return dlayer.kernel[...], dx

    dkernel, dx = map(np.asarray, nnx.jit(draws)(layer))
    assert len(np.unique(dx[:, 1, 1])) > 10
    w, q_x = NVFP4().rounded(layer.kernel[...], (0, 1)), NVFP4().rounded(X, (0,))
    np.testing.assert_allclose(dx.mean(0), g @ np.asarray(w).T, atol=0.02)
    np.testing.assert_allclose(dkernel.mean(0), np.asarray(q_x).T @ g, atol=0.06)


def test_each_call_draws_its_noise():
    layer = nvfp4(stochastic_rounding=True)
    first, second = outputs_and_gradients(layer), outputs_and_gradients(layer)
    same([first[0]], [second[0]], rtol=0)
    assert not np.array_equal(first[1], second[1])
    assert not np.array_equal(first[3], second[3])
    assert layer.rngs.count[...] == 2
    assert not nnx.state(nvfp4(), nnx.RngState)


def test_layers_are_made_of_others():
    plain = nnx.Linear(20, 6, rngs=nnx.Rngs(0))
    kernel = plain.kernel
    layer = fcg.MXLinear.from_layer(plain, format="mxfp4", block=8)
    assert layer is plain
    assert layer.kernel is kernel
    same(outputs_and_gradients(layer), outputs_and_gradients(mx(format="mxfp4")), rtol=0)
    model = nnx.Sequential(nnx.Linear(20, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 20, rngs=nnx.Rngs(1)))
    fcg.convert(model, where="layers/0", rules={nnx.Linear: fcg.NVFP4Linear})
    assert [type(part) for part in model.layers] == [fcg.NVFP4Linear, nnx.Linear]
    run = nnx.jit(lambda layer, x: layer(x))
    np.testing.assert_array_equal(run(model.layers[0], X), run(nvfp4(), X))
    assert model.layers[0].rngs.count[...] == 1


def test_bad_arguments():
    for argument, known in (
        ("format", "'mxfp8', 'mxfp4'"),
        ("gradient", "'e4m3', 'e5m2', 'e2m1'"),
        ("scale", "'up', 'down'"),
        ("residuals", "'quantized', 'original'"),
    ):
        message = re.escape(f"MXLinear: {argument}='fp3' is none of {known}")
        with pytest.raises(ValueError, match=message):
            mx(**{argument: "fp3"})
    with pytest.raises(ValueError, match=r"MXLinear: block=0 must be 1 or more"):
        mx(block=0)
    with pytest.raises(ValueError, match=r"NVFP4Linear: residuals='none' is none of"):
        nvfp4(residuals="none")
    plain = nnx.Linear(20, 6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"MXLinear: format='fp3' is none of"):
        fcg.MXLinear.from_layer(plain, format="fp3")
    assert type(plain) is nnx.Linear
    for make in (mx, nvfp4):
        with pytest.raises(ValueError, match=r"computes its product itself .* `dot_general`"):
            make(dot_general=lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs))
        with pytest.raises(TypeError, match=r"its input is int32"):
            make()(jnp.ones((2, 20), jnp.int32))
    with pytest.raises(TypeError, match=r"NVFP4Linear.from_layer takes an nnx.Linear"):
        fcg.NVFP4Linear.from_layer(nnx.Embed(3, 4, rngs=nnx.Rngs(0)))
