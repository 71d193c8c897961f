"""Int8Linear and Int8Conv: codes, products, the three backwards, and what is kept."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.low_bit.int8.int8_codes import encode_int8

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 4, 6), np.float32)
G = RNG.standard_normal((3, 4, 5), np.float32)
BACKWARDS = {
    "float": {},
    "original": {"residuals": "original"},
    "int8": {"backward": "int8"},
    "switchback": {"backward": "switchback"},
}


@partial(jax.jit, static_argnums=1)
def encoded(x, axes, key=None):
    """The codes and scales of an array, and what they stand for."""
    a = encode_int8(x, axes, key)
    return a.codes, a.scale, a.values(x.dtype)


def codes(a, axes):
    """By hand: integers and their scale."""
    a = np.asarray(a)
    scale = np.abs(a).max(axes, keepdims=True) / 127
    return np.rint(a / scale), scale


def layer_of(**kwargs):
    return fcg.Int8Linear(6, 5, bias_init=nnx.initializers.normal(1.0), **kwargs, rngs=nnx.Rngs(0))


def gradients(*cases):
    """Of each layer, input and cotangent: output, kernel's, bias's and input's gradient.

    All of them are one program.
    """
    layers, xs, gs = zip(*cases, strict=True)
    split = [nnx.split(layer, nnx.Param, ...) for layer in layers]

    @jax.jit
    def run(states, xs, gs):
        found = []
        for (graphdef, *_), (params, rest), x, g in zip(split, states, xs, gs, strict=True):

            def apply(params, x, graphdef=graphdef, rest=rest):
                return nnx.merge(graphdef, params, rest, copy=True)(x)

            y, pull = jax.vjp(apply, params, x)
            grads, dx = pull(g)
            found.append((y, grads["kernel"][...], grads["bias"][...], dx))
        return found

    xs, gs = (tuple(map(jnp.asarray, arrays)) for arrays in (xs, gs))
    return run([states for _, *states in split], xs, gs)


# Codes.


@pytest.mark.smoke
def test_ties_go_to_the_even_code_and_bounds_are_codes():
    x = np.float32([-127, -126.5, -2.5, -1.5, -0.5, 0, 0.5, 1.5, 2.5, 63.5, 126.5, 127])
    powers = np.float32(2.0) ** np.array([0, -60, -3, 3, 60], np.float32)
    codes, scale, _ = encoded(x * powers[:, None], -1)
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(scale[:, 0], powers)
    expected = [-127, -126, -2, -2, 0, 0, 0, 2, 2, 64, 126, 127]
    np.testing.assert_array_equal(codes, np.broadcast_to(expected, (5, 12)))


def test_the_largest_element_comes_back():
    x = X.reshape(-1, 6) * np.logspace(-30, 30, 12, dtype=np.float32)[:, None]
    largest = np.argmax(np.abs(x), -1)[:, None]
    for key in (None, jax.random.key(0)):
        codes, _, values = map(np.asarray, encoded(x, -1, key))
        assert (np.abs(np.take_along_axis(codes, largest, -1)) == 127).all()
        back = np.take_along_axis(values, largest, -1)
        np.testing.assert_allclose(back, np.take_along_axis(x, largest, -1), rtol=3e-7)


def test_stochastic_rounding_is_right_on_average():
    x = np.float32([0.0, 0.25, -0.25, 3.9, 5.0, 127.0])
    codes = np.asarray(encoded(np.broadcast_to(x, (20000, 6)), -1, jax.random.key(0))[0])
    assert set(np.unique(codes[:, 1])) == {0, 1}
    np.testing.assert_array_equal(codes[:, [0, 4, 5]], np.broadcast_to([0, 5, 127], (20000, 3)))
    np.testing.assert_allclose(codes.mean(0), x, atol=0.015)


# Products.


def test_it_is_int8_that_is_multiplied():
    conv = fcg.Int8Conv(4, 2, (3,), rngs=nnx.Rngs(0))
    for layer, x in ((layer_of(), jnp.asarray(X)), (conv, jnp.ones((1, 8, 4)))):
        program = jax.jit(layer).lower(x).as_text()
        assert re.search(r"xi8>, tensor<\S*xi8>\) -> tensor<\S*xi32>", program)


@pytest.mark.parametrize(
    ("row", "channel"), [("per_row", "per_channel"), ("per_tensor", "per_tensor")]
)
def test_the_gradients_in_float64(row, channel):
    x, g = np.float64(X), np.float64(G)

    def layer(kwargs):
        scales = {"activation_scale": row, "weight_scale": channel}
        return layer_of(param_dtype=jnp.float64, **kwargs, **scales)

    with jax.enable_x64(True):
        layers = [layer(kwargs) for kwargs in BACKWARDS.values()]
        found = gradients(*((layer, x, g) for layer in layers))
        w = np.asarray(layers[0].kernel[...])
        q_x, s_x = codes(x, -1 if row == "per_row" else None)
        q_w, s_w = codes(w, 0 if channel == "per_channel" else None)
        s_w = s_w[0]
        q_u, s_u = codes(g * s_w, -1)
        q_v, s_v = codes(g * s_x, (0, 1))
        y = (q_x @ q_w) * s_x * s_w + np.asarray(layers[0].bias[...])

        def of_rows(a, b):
            return np.einsum("abi,abo->io", a, b)

        expected = {
            "float": (g @ (q_w * s_w).T, of_rows(q_x * s_x, g)),
            "original": (g @ w.T, of_rows(x, g)),
            "int8": ((q_u @ q_w.T) * s_u, of_rows(q_x, q_v) * s_v[0]),
            "switchback": ((q_u @ q_w.T) * s_u, of_rows(x, g)),
        }
        for name, values in zip(BACKWARDS, found, strict=True):
            dx, dw = expected[name]
            for value, e in zip(values, (y, dw, g.sum((0, 1)), dx), strict=True):
                np.testing.assert_allclose(value, e, rtol=1e-12, atol=1e-12, err_msg=name)


def test_stochastic_gradients_are_right_on_average_and_drawn_anew():
    layer = layer_of(backward="int8", stochastic_rounding=True)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    @jax.vmap
    def drawn(key):
        noise = jax.tree.map(lambda a: a, rest)
        noise["noise"]["key"][...] = key
        _, pull = jax.vjp(
            lambda params, x: nnx.merge(graphdef, params, noise, copy=True)(x),
            params,
            jnp.asarray(X),
        )
        grads, dx = pull(jnp.asarray(G))
        return grads["kernel"][...], dx

    (q_x, s_x), (q_w, s_w) = codes(X, -1), codes(layer.kernel[...], 0)
    exact = np.einsum("abi,abo->io", q_x * s_x, G), G @ (q_w * s_w).T
    for found, expected in zip(drawn(jax.random.split(jax.random.key(3), 400)), exact, strict=True):
        found = np.asarray(found)
        spread = found.std(0)
        assert (spread > 0).any()
        error = np.abs(found.mean(0) - expected)
        assert (error <= 5 * spread / 20 + 1e-5).all()
    count = layer.noise.count[...]
    assert nnx.jit(lambda layer, x: layer(x))(layer, X[0, 0]).shape == (5,)
    assert layer.noise.count[...] == count + 1


def test_sums_that_int32_does_not_hold():
    n = 140_000  # times 127 x 127 is above 2^31
    layer = fcg.Int8Linear(n, 1, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    y = jax.jit(layer)(np.ones((2, n), np.float32) * np.float32([[1], [-1]]))
    # Summed in float32, which rounds; int32 would wrap around.
    np.testing.assert_allclose(y, [[n], [-n]], rtol=1e-3)


# Dtypes, extreme and missing values.


@pytest.mark.parametrize(
    ("dtype", "backward"),
    [(jnp.bfloat16, "switchback"), (jnp.float16, "int8")],
)
def test_half_precision(dtype, backward):
    layer, plain = (layer_of(dtype=d, backward=backward) for d in (dtype, None))
    x, g = X.astype(dtype), G.astype(dtype)
    plain.kernel[...] = np.asarray(plain.kernel[...]).astype(dtype).astype(np.float32)
    found, wide = gradients((layer, x, g), (plain, np.float32(x), np.float32(g)))
    assert [a.dtype for a in found] == [dtype, jnp.float32, jnp.float32, dtype]
    for a, b in zip(found, wide, strict=True):
        tolerance = 8 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.float32(a), b, rtol=tolerance, atol=tolerance)


def test_extreme_values():
    cases = [(jnp.float32, "int8"), (jnp.bfloat16, "int8"), (jnp.float16, "float")]
    given = []
    for dtype, backward in cases:
        limits = jnp.finfo(dtype)
        layer = layer_of(dtype=dtype, backward=backward)
        layer.kernel[...] = np.full((6, 5), 0.01, np.float32)
        layer.bias[...] = np.zeros(5, np.float32)
        # Of the second row a 127th is no normal number.
        x = np.float64([[1] + 5 * [limits.max], 6 * [100 * float(limits.tiny)]]).astype(dtype)
        given.append((layer, x, np.ones((2, 5), dtype)))
    for (dtype, _), (y, *grads) in zip(cases, gradients(*given), strict=True):
        limits = jnp.finfo(dtype)
        np.testing.assert_allclose(np.float32(y[0]), 0.05 * float(limits.max), rtol=0.01)
        np.testing.assert_allclose(np.float32(y[1]), 6 * float(limits.tiny), rtol=0.01)
        assert not any(np.isnan(np.float32(a)).any() for a in grads)


def test_what_is_not_finite_stays_so_in_its_row():
    rows = np.array([0, 1, 1, 0], bool)
    x, bad = X[0], X[0].copy()
    bad[1, 2], bad[2, 0] = np.nan, -np.inf
    with np.errstate(divide="ignore"):
        bad_g = G[0] / np.float32(~rows)[:, None]
    given = []
    for backward in ("float", "int8", "switchback"):
        layer = layer_of(backward=backward, weight_scale="per_channel")
        kernel = np.array(layer.kernel[...])
        kernel[0, 3], kernel[2, 4] = np.nan, np.inf
        layer.kernel[...] = kernel
        given += [(layer, bad, G[0]), (layer_of(backward=backward), x, bad_g)]
    found = gradients(*given)
    for (y, dkernel, *_), (*_, dx) in zip(found[::2], found[1::2], strict=True):
        np.testing.assert_array_equal(np.isfinite(y), ~rows[:, None] & (np.arange(5) < 3))
        assert not np.isfinite(dkernel).any(1)[[0, 2]].any()
        np.testing.assert_array_equal(np.isfinite(dx).any(-1), ~rows)


def test_zeros_and_nothing():
    backwards = ("int8", "switchback")
    layers = [layer_of(backward=b, activation_scale="per_tensor") for b in backwards]
    sizes = (2, 0)
    arrays = [[np.zeros((n, k), np.float32) for k in (6, 5)] for n in sizes]
    found = gradients(*((layer, *xg) for xg in arrays for layer in layers))
    bias = np.asarray(layers[0].bias[...])
    for i, (y, *grads) in enumerate(found):
        n = sizes[i // 2]
        np.testing.assert_array_equal(y, np.broadcast_to(bias, (n, 5)))
        assert [a.shape for a in grads] == [(6, 5), (5,), (n, 6)]
        assert not any(np.asarray(a).any() for a in grads)


# What is kept.


def test_a_byte_an_element_is_kept():
    def kept(layer, x):
        graphdef, state = nnx.split(layer)

        def apply(state, x):
            return nnx.merge(graphdef, state)(jnp.sin(x))

        x = jnp.asarray(x)
        return fcg.residual_bytes(apply, state, x) - fcg.residual_bytes(jnp.sin, x)

    for backward in ("float", "int8"):
        assert kept(layer_of(backward=backward), X) == X.size + 4 * X.shape[0] * X.shape[1]
    for original in (layer_of(residuals="original"), layer_of(backward="switchback")):
        assert kept(original, X) == X.nbytes
    conv = fcg.Int8Conv(3, 2, (3,), rngs=nnx.Rngs(0))
    assert kept(conv, jnp.ones((2, 8, 3))) == 2 * 8 * 3 + 4 * 2


# Layers.


def test_a_layer_of_nnx_becomes_one_of_int8():
    model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.relu)
    kernel = model.layers[0].kernel
    fcg.convert(model, rules={nnx.Linear: fcg.Int8Linear})
    assert type(model.layers[0]) is fcg.Int8Linear
    assert model.layers[0].kernel is kernel
    layer = fcg.Int8Linear.from_layer(
        fcg.Linear(6, 5, rngs=nnx.Rngs(0)),
        backward="int8",
        stochastic_rounding=True,
        rngs=nnx.Rngs(noise=1),
    )
    assert layer.rounding.backward == "int8"
    assert layer.noise is not None
    conv = fcg.Int8Conv.from_layer(nnx.Conv(3, 2, (3,), rngs=nnx.Rngs(0)), backward="switchback")
    assert conv.rounding.weight_scale == "per_tensor"
    assert jax.eval_shape(conv, jnp.ones((2, 8, 3))).shape == (2, 8, 2)


def test_bad_arguments():
    conv = nnx.Conv(3, 2, (3,), rngs=nnx.Rngs(0))
    for wrong in ("backward", "residuals", "activation_scale", "weight_scale"):
        with pytest.raises(ValueError, match=rf"Int8Linear: {wrong}='x' is none of '"):
            layer_of(**{wrong: "x"})
    with pytest.raises(ValueError, match="Int8Linear: backward='switchback' computes the kernel"):
        layer_of(backward="switchback", residuals="quantized")
    with pytest.raises(ValueError, match="leave out residuals='original'"):
        layer_of(backward="int8", residuals="original")
    with pytest.raises(ValueError, match="backward='float' rounds none: write"):
        layer_of(stochastic_rounding=True)
    with pytest.raises(ValueError, match="Int8Conv: stochastic_rounding=True draws noise: write"):
        fcg.Int8Conv.from_layer(conv, backward="int8", stochastic_rounding=True)
    with pytest.raises(ValueError, match="Int8Linear computes its product itself"):
        layer_of(dot_general=lambda *args, **kwargs: 0)
    with pytest.raises(TypeError, match=r"Int8Linear quantizes .*; its input is int32"):
        layer_of()(jnp.ones((2, 6), jnp.int32))
    with pytest.raises(TypeError, match=r"Int8Conv.from_layer takes an nnx.Conv, got a Linear"):
        fcg.Int8Conv.from_layer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
