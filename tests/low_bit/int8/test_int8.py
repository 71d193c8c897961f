"""Int8Linear and Int8Conv: codes, products, the three backwards, and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.low_bit.int8.int8_codes import encode_int8

X = jax.random.normal(jax.random.key(0), (3, 4, 6))
G = jax.random.normal(jax.random.key(1), (3, 4, 5))


def codes(a, axes):
    """By hand: integers and their scale."""
    a = np.asarray(a)
    scale = np.abs(a).max(axes, keepdims=True) / 127
    return np.rint(a / scale), scale


def layer_of(**kwargs):
    return fcg.Int8Linear(6, 5, bias_init=nnx.initializers.normal(1.0), **kwargs, rngs=nnx.Rngs(0))


def in_float64(layer):
    graphdef, state = nnx.split(layer)
    return nnx.merge(
        graphdef,
        jax.tree.map(
            lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, state
        ),
    )


def gradients(layer, x, g):
    """Output, kernel's, bias's and input's gradient, compiled."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(params, rest, x, g):
        def apply(params, x):
            return nnx.merge(graphdef, params, rest, copy=True)(x)

        y, pull = jax.vjp(apply, params, x)
        return y, *pull(g)

    y, grads, dx = run(params, rest, x, g)
    return y, grads["kernel"][...], grads["bias"][...], dx


# Codes.


def test_ties_go_to_the_even_code_and_bounds_are_codes():
    x = jnp.array([-127, -126.5, -2.5, -1.5, -0.5, 0, 0.5, 1.5, 2.5, 63.5, 126.5, 127])
    a = encode_int8(x, -1)
    assert a.codes.dtype == jnp.int8
    assert a.scale == 1
    expected = [-127, -126, -2, -2, 0, 0, 0, 2, 2, 64, 126, 127]
    np.testing.assert_array_equal(a.codes, expected)
    for power in (-60, -3, 3, 60):
        np.testing.assert_array_equal(encode_int8(x * 2.0**power, -1).codes, expected)


def test_the_largest_element_comes_back():
    x = X.reshape(-1, 6) * jnp.logspace(-30, 30, 12)[:, None]
    largest = jnp.argmax(jnp.abs(x), -1, keepdims=True)
    for key in (None, jax.random.key(0)):
        a = encode_int8(x, -1, key)
        assert (jnp.abs(jnp.take_along_axis(a.codes, largest, -1)) == 127).all()
        back = jnp.take_along_axis(a.values(jnp.float32), largest, -1)
        np.testing.assert_allclose(back, jnp.take_along_axis(x, largest, -1), rtol=3e-7)


def test_stochastic_rounding_is_right_on_average():
    x = jnp.array([0.0, 0.25, -0.25, 3.9, 5.0, 127.0])
    many = jnp.broadcast_to(x, (20000, 6))
    a = encode_int8(many, -1, jax.random.key(0))
    assert set(np.unique(a.codes[:, 1])) == {0, 1}
    np.testing.assert_array_equal(a.codes[:, [0, 4, 5]], np.broadcast_to([0, 5, 127], (20000, 3)))
    np.testing.assert_allclose(a.codes.mean(0), x, atol=0.015)


# Products.


def test_it_is_int8_that_is_multiplied():
    linear = str(jax.make_jaxpr(layer_of())(X))
    assert "preferred_element_type=int32" in linear
    conv = fcg.Int8Conv(4, 2, (3,), rngs=nnx.Rngs(0))
    assert "preferred_element_type=int32" in str(jax.make_jaxpr(conv)(jnp.ones((1, 8, 4))))


@pytest.mark.parametrize(
    ("row", "channel"), [("per_row", "per_channel"), ("per_tensor", "per_tensor")]
)
@pytest.mark.parametrize("backward", ["float", "original", "int8", "switchback"])
def test_the_gradients_in_float64(backward, row, channel):
    kind = {"residuals": "original"} if backward == "original" else {"backward": backward}
    with jax.enable_x64(True):
        layer = in_float64(layer_of(**kind, activation_scale=row, weight_scale=channel))
        x, g = (jnp.asarray(np.asarray(a), jnp.float64) for a in (X, G))
        found = gradients(layer, x, g)
        w = np.asarray(layer.kernel[...])
        q_x, s_x = codes(x, -1 if row == "per_row" else None)
        q_w, s_w = codes(w, 0 if channel == "per_channel" else None)
        s_w = s_w[0]
        q_u, s_u = codes(g * s_w, -1)
        q_v, s_v = codes(g * s_x, (0, 1))
        y = (q_x @ q_w) * s_x * s_w + np.asarray(layer.bias[...])

        def of_rows(a, b):
            return np.einsum("abi,abo->io", a, b)

        dx, dw = {
            "float": lambda: (g @ (q_w * s_w).T, of_rows(q_x * s_x, g)),
            "original": lambda: (g @ w.T, of_rows(x, g)),
            "int8": lambda: ((q_u @ q_w.T) * s_u, of_rows(q_x, q_v) * s_v[0]),
            "switchback": lambda: ((q_u @ q_w.T) * s_u, of_rows(x, g)),
        }[backward]()
        for value, expected in zip(found, (y, dw, g.sum((0, 1)), dx), strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


def test_stochastic_gradients_are_right_on_average_and_drawn_anew():
    layer = layer_of(backward="int8", stochastic_rounding=True)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def kernel_and_input(key):
        noise = jax.tree.map(lambda a: a, rest)
        noise["noise"]["key"][...] = key
        _, pull = jax.vjp(
            lambda params, x: nnx.merge(graphdef, params, noise, copy=True)(x), params, X
        )
        grads, dx = pull(G)
        return grads["kernel"][...], dx

    keys = jax.random.split(jax.random.key(3), 400)
    drawn = jax.jit(jax.vmap(kernel_and_input))(keys)
    (q_x, s_x), (q_w, s_w) = codes(X, -1), codes(layer.kernel[...], 0)
    exact = np.einsum("abi,abo->io", q_x * s_x, G), G @ (q_w * s_w).T
    for found, expected in zip(drawn, exact, strict=True):
        spread = found.std(0)
        assert (spread > 0).any()
        error = np.abs(found.mean(0) - expected)
        assert (error <= 5 * spread / 20 + 1e-5).all()
    count = layer.noise.count[...]
    assert layer(X[0, 0]).shape == (5,)
    assert layer.noise.count[...] == count + 1


def test_sums_that_int32_does_not_hold():
    n = 140_000  # times 127 x 127 is above 2^31
    layer = fcg.Int8Linear(n, 1, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((1, n))) == n
    assert layer(-jnp.ones((1, n))) == -n


# Dtypes, extreme and missing values.


@pytest.mark.parametrize(
    ("dtype", "backward"),
    [(jnp.bfloat16, "switchback"), (jnp.float16, "int8")],
)
def test_half_precision(dtype, backward):
    layer = layer_of(dtype=dtype, backward=backward)
    x, g = X.astype(dtype), G.astype(dtype)
    found = gradients(layer, x, g)
    assert [a.dtype for a in found] == [dtype, jnp.float32, jnp.float32, dtype]
    layer.kernel[...] = layer.kernel[...].astype(dtype).astype(jnp.float32)
    layer.dtype = None
    wide = gradients(layer, x.astype(jnp.float32), g.astype(jnp.float32))
    for a, b in zip(found, wide, strict=True):
        tolerance = 8 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.float32(a), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "backward"),
    [(jnp.float32, "int8"), (jnp.bfloat16, "int8"), (jnp.float16, "float")],
)
def test_extreme_values(dtype, backward):
    limits = jnp.finfo(dtype)
    layer = layer_of(dtype=dtype, backward=backward)
    top = jnp.full((1, 6), limits.max).at[0, 0].set(1)
    # Of which a 127th is no normal number.
    x = jnp.concatenate([top.astype(dtype), jnp.full((1, 6), 100 * limits.tiny, dtype)])
    layer.kernel[...] = jnp.full((6, 5), 0.01)
    layer.bias[...] = jnp.zeros(5)
    y, *grads = gradients(layer, x, jnp.ones((2, 5), dtype))
    np.testing.assert_allclose(np.float32(y[0]), 0.05 * float(limits.max), rtol=0.01)
    np.testing.assert_allclose(np.float32(y[1]), 6 * float(limits.tiny), rtol=0.01)
    assert all(not jnp.isnan(a).any() for a in grads)


@pytest.mark.parametrize("backward", ["float", "int8", "switchback"])
def test_what_is_not_finite_stays_so_in_its_row(backward):
    rows = jnp.array([0, 1, 1, 0], bool)
    layer = layer_of(backward=backward, weight_scale="per_channel")
    layer.kernel[...] = layer.kernel[...].at[0, 3].set(jnp.nan).at[2, 4].set(jnp.inf)
    bad = X[0].at[1, 2].set(jnp.nan).at[2, 0].set(-jnp.inf)
    y, dkernel, *_ = gradients(layer, bad, G[0])
    np.testing.assert_array_equal(np.isfinite(y), ~rows[:, None] & (jnp.arange(5) < 3))
    assert not np.isfinite(dkernel).any(1)[jnp.array([0, 2])].any()
    *_, dx = gradients(layer_of(backward=backward), X[0], G[0] / ~rows[:, None])
    np.testing.assert_array_equal(np.isfinite(dx).any(-1), ~rows)


@pytest.mark.parametrize("backward", ["int8", "switchback"])
def test_zeros_and_nothing(backward):
    layer = layer_of(backward=backward, activation_scale="per_tensor")
    y, *grads = gradients(layer, jnp.zeros((2, 6)), jnp.zeros((2, 5)))
    np.testing.assert_array_equal(y, jnp.broadcast_to(layer.bias[...], (2, 5)))
    assert all((a == 0).all() for a in grads)
    y, *grads = gradients(layer, jnp.zeros((0, 6)), jnp.zeros((0, 5)))
    assert y.shape == (0, 5)
    assert [a.shape for a in grads] == [(6, 5), (5,), (0, 6)]
    assert all((a == 0).all() for a in grads)


# What is kept.


def test_a_byte_an_element_is_kept():
    def kept(layer, x):
        graphdef, state = nnx.split(layer)

        def apply(state, x):
            return nnx.merge(graphdef, state)(jnp.sin(x))

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
    assert conv(jnp.ones((2, 8, 3))).shape == (2, 8, 2)


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
