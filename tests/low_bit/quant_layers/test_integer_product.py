"""Products of integers: exact, the same packed and unpacked, and taken only where they apply."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flax_customgrad as fcg
from flax_customgrad.low_bit.quant_layers import integer_product as module

ROWS = 6
"""Few enough that every supported version of JAX multiplies integers."""


@pytest.fixture(autouse=True)
def _small_kernels(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("other platforms multiply floats")
    monkeypatch.setattr(module, "_LEAST_WEIGHTS", 0)


def _normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def _layer(weight=None, activation=None, features=(40, 9), **kwargs):
    weight = fcg.FakeQuant(8, axis=-1) if weight is None else weight
    activation = fcg.FakeQuant(8) if activation is None else activation
    layer = fcg.QuantLinear(
        *features, weight=weight, activation=activation, **kwargs, rngs=nnx.Rngs(0)
    )
    layer.bias[...] = _normal(features[1], seed=1)
    return layer


@nnx.jit
def _called(layer, x):
    return layer(x)


def _multiplies_integers(layer, x):
    program = jax.jit(lambda x: layer(x)).lower(x).as_text()
    return bool(re.search(r"dot_general.*xi8>", program))


def _exactly(layer, x):
    """The output in float64: products of integers, each scaled once."""
    x_q, w_q = (
        (np.float64(c.codes) + c.scheme.low, np.float64(c.scheme.step(*c.parameters)))
        for c in (layer.activation.quantize(x), layer.weight.quantize(layer.kernel[...]))
    )
    return (x_q[0] @ w_q[0]) * x_q[1] * w_q[1] + np.float64(layer.bias[...])


CASES = {
    "channels": {},
    "one step": {"weight": fcg.FakeQuant(8)},
    "tokens": {"activation": fcg.FakeQuant(8, axis="token")},
    "4 bits": {"weight": fcg.FakeQuant(4, axis=-1), "activation": fcg.FakeQuant(4)},
    "2 bits": {"weight": fcg.FakeQuant(2, axis=-1)},
    "learned": {"weight": fcg.LSQ(8, axis=-1), "activation": fcg.LSQ(8)},
    "ternary": {"weight": fcg.AbsMean(), "activation": fcg.TQT(8)},
    "unsigned": {"weight": fcg.TWN(axis=-1), "activation": fcg.PACT(7)},
    "half": {"dtype": jnp.bfloat16},
    "original": {"residuals": "original"},
}


def _made(name):
    layer = nnx.clone(_layer(**CASES[name]))
    if isinstance(layer.activation, fcg.LSQ | fcg.TQT | fcg.PACT):
        layer.activation.observe(_normal(ROWS, 40))
    return layer


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_exact_sums_scaled_once_packed_and_unpacked(name):
    layer, x = _made(name), _normal(ROWS, 40)
    assert _multiplies_integers(layer, x)
    y = _called(layer, x)
    if layer.dtype is None:
        # Three roundings: two steps and the bias. A sum of 40 floats has more.
        exact = _exactly(layer, x)
        np.testing.assert_allclose(y, exact, rtol=3e-7, atol=3e-7 * np.abs(exact).max())
    else:
        assert y.dtype == layer.dtype
        floats = layer.activation(x) @ layer.weight(layer.kernel[...]) + layer.bias[...]
        np.testing.assert_allclose(np.float32(y), floats, rtol=0.01, atol=0.05)
    packed = fcg.pack(layer)
    assert _multiplies_integers(packed, x)
    for rows in (x, x[:1], x[0], x[None, :2], x[:0]):
        np.testing.assert_array_equal(_called(packed, rows), _called(layer, rows))
    np.testing.assert_array_equal(packed(x), layer(x))


def test_the_gradient_is_that_of_the_floats():
    x = _normal(ROWS, 40)

    def gradients(layer):
        def loss(layer, x):
            return (layer(x) * jnp.arange(9.0)).sum()

        return nnx.jit(nnx.grad(loss, argnums=(0, 1)))(layer, x)

    for name in ("channels", "learned", "original"):
        found = gradients(_made(name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_gains", lambda *sizes: False)
            jax.clear_caches()
            assert not _multiplies_integers(_made(name), x)
            expected = gradients(_made(name))
        jax.clear_caches()
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_transformations_of_integers_and_of_floats_agree():
    layer, x = _layer(features=(8, 3)), _normal(4, 8)
    layer.activation = fcg.FakeQuant(8, dynamic=False)
    layer.activation.observe(x)

    def results(x):
        def loss(x):
            return (layer(x) ** 3).sum()

        def looped(x):
            return jax.lax.scan(lambda c, row: (c, layer(row[None])), 0.0, x)[1].sum()

        return {
            "vmap": jax.vmap(layer)(x),
            "vmap of matrices": jax.vmap(layer)(x[:, None]),
            "hessian": jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(x),
            "checkpoint": jax.grad(jax.checkpoint(loss))(x),
            "scan": jax.grad(looped)(x),
        }

    found = jax.jit(results)(x)
    with jax.disable_jit():
        np.testing.assert_allclose(layer(x), found["vmap"], rtol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_gains", lambda *sizes: False)
        jax.clear_caches()
        expected = jax.jit(results)(x)
    jax.clear_caches()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.smoke
def test_what_is_not_finite_makes_its_row_or_channel_nan():
    recorded = fcg.FakeQuant(8, dynamic=False)
    recorded.observe(jnp.array([3.0]))
    layer, x = _layer(fcg.FakeQuant(8, dynamic=False), recorded), _normal(ROWS, 40)
    assert not jnp.isnan(_called(layer, x)).any()
    for bad in (jnp.inf, jnp.nan):
        y = _called(layer, x.at[2, 5].set(bad))
        np.testing.assert_array_equal(jnp.isnan(y).any(1), jnp.arange(ROWS) == 2)
        spoiled = nnx.clone(layer)
        spoiled.kernel[...] = layer.kernel[...].at[7, 4].set(bad)
        y = _called(spoiled, x)
        np.testing.assert_array_equal(jnp.isnan(y), jnp.arange(9)[None] == jnp.full((ROWS, 1), 4))


def test_the_largest_integers_do_not_overflow():
    n = 128 * 8
    layer = _layer(fcg.LSQ(8), fcg.LSQ(8), features=(n, 2))
    layer.weight.scale[...] = layer.activation.scale[...] = 1.0
    layer.bias[...] = 0 * layer.bias[...]
    layer.kernel[...] = jnp.full((n, 2), -128.0)
    assert _called(layer, jnp.full((ROWS, n), -128.0)).tolist() == [[n * 2.0**14] * 2] * ROWS
    # One product more than int32 holds.
    shapes = {128: 2**31 // 128**2, 127: (2**31 - 1) // 127**2}
    for largest, most in shapes.items():
        scheme = fcg.LSQ(8).quantize(jnp.ones(1)).scheme
        scheme = scheme if largest == 128 else fcg.FakeQuant(8).quantize(jnp.ones(1)).scheme
        fits = [module._has_int32_sums(scheme, scheme, terms) for terms in (most - 1, most + 1)]
        assert fits == [True, False]


FLOATS = {
    "the input is not quantized": {"activation": None},
    "a zero point": {"activation": fcg.FakeQuant(8, symmetric=False)},
    "a learned offset": {"activation": fcg.LSQPlus(8)},
    "9 bits": {"weight": fcg.FakeQuant(9)},
    "unsigned 8 bits": {"activation": fcg.PACT(8)},
    "blocks": {"weight": fcg.FakeQuant(4, axis=0, block=8)},
    "a step for each input": {"weight": fcg.FakeQuant(8, axis=0)},
    "a step for each feature": {"activation": fcg.LSQ(8, axis=-1)},
    "two sizes": {"weight": fcg.TTQ()},
}


@pytest.mark.parametrize("name", FLOATS)
def test_others_are_multiplied_as_floats(name):
    kwargs = {"weight": fcg.FakeQuant(8), "activation": fcg.FakeQuant(8), **FLOATS[name]}
    layer = nnx.clone(fcg.QuantLinear(40, 9, **kwargs, rngs=nnx.Rngs(0)))
    x = _normal(ROWS, 40)
    if isinstance(layer.activation, fcg.LSQ | fcg.PACT):
        layer.activation.observe(x)
    for layer_ in (layer, fcg.pack(layer)):
        assert not _multiplies_integers(layer_, x)


def test_float64_is_multiplied_as_it_is():
    args = _layer(), _normal(ROWS, 40)
    with jax.enable_x64(True):
        layer, x = jax.tree.map(lambda a: a.astype(jnp.float64), args)
        assert not _multiplies_integers(layer, x)


def test_symbolic_rows():
    layer = _layer()
    graphdef, state = nnx.split(layer)
    shape = jax.export.symbolic_shape("rows, 40")
    exported = jax.export.export(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)))(
        state, jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    x = _normal(5, 40)
    np.testing.assert_allclose(exported.call(state, x), _called(layer, x), rtol=1e-5, atol=1e-6)


def test_a_bias_in_int32_is_added_to_integers():
    layer, plain, x = _layer(bias="int32"), _layer(), _normal(ROWS, 40)
    assert _multiplies_integers(layer, x)
    s_x, s_w = (
        q.quantize(a).parameters[0]
        for q, a in ((layer.activation, x), (layer.weight, layer.kernel[...]))
    )
    s = s_x * s_w[0]
    plain.bias[...] = jnp.round(layer.bias[...] / s) * s
    np.testing.assert_allclose(_called(layer, x), _called(plain, x), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(_called(fcg.pack(layer), x), _called(layer, x))


def test_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((2, 4), ("rows", "out"), axis_types=(AxisType.Explicit,) * 2)
    layer, x = _layer(features=(16, 8)), _normal(ROWS, 16)
    expected = _called(layer, x)
    with jax.set_mesh(mesh):
        sharded = nnx.clone(layer)
        sharded.kernel.set_value(jax.device_put(layer.kernel[...], P(None, "out")))
        sharded.bias.set_value(jax.device_put(layer.bias[...], P("out")))
        x = jax.device_put(x, P("rows", None))
        assert _multiplies_integers(sharded, x)
        y = _called(sharded, x)
        assert jax.typeof(y).sharding.spec == P("rows", "out")
        np.testing.assert_array_equal(y, expected)


def test_large_kernels_and_for_older_versions_few_rows(monkeypatch):
    monkeypatch.setattr(module, "_LEAST_WEIGHTS", 100)
    monkeypatch.setattr(module, "_MOST_ROWS", 8)
    assert module._gains((2, 4), 100)
    assert not module._gains((2, 4), 99)
    assert not module._gains((3, 3), 100)
    assert not module._gains((), 100)
    monkeypatch.setattr(module, "_MOST_ROWS", None)
    assert module._gains((1000,), 100)
    assert module._gains((), 100)


def _conv(shape=(ROWS, 5, 5, 4), window=(3, 3), axis=None, **kwargs):
    quantizers = {"weight": fcg.FakeQuant(4, axis=-1), "activation": fcg.FakeQuant(8, axis=axis)}
    layer = fcg.QuantConv(shape[-1], 7, window, **quantizers, **kwargs, rngs=nnx.Rngs(0))
    layer.bias[...] = _normal(7, seed=1)
    return layer, _normal(*shape)


def _convolves_integers(layer, x):
    program = jax.jit(lambda x: layer(x)).lower(x).as_text()
    return bool(re.search(r"convolution.*xi8>", program))


CONVS = {
    "strides": {"strides": 2},
    "an image a scale": {"axis": 0, "padding": "VALID"},
    "circular": {"padding": "CIRCULAR", "kernel_dilation": 2},
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions_of_integers(name, monkeypatch):
    monkeypatch.setattr(module, "_MOST_ROWS", None)
    layer, x = _conv(**CONVS[name])
    assert _convolves_integers(layer, x)
    y, packed = _called(layer, x), fcg.pack(layer)
    assert _convolves_integers(packed, x)
    np.testing.assert_array_equal(_called(packed, x), y)
    plain = fcg.Conv(
        4, 7, (3, 3), **{k: v for k, v in CONVS[name].items() if k != "axis"}, rngs=nnx.Rngs(0)
    )
    plain.kernel[...], plain.bias[...] = layer.weight(layer.kernel[...]), layer.bias[...]
    np.testing.assert_allclose(y, plain(layer.activation(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"shape": (ROWS, 5, 4), "window": (3,)},
        {"window": (1, 3)},
        {"feature_group_count": 1, "mask": jnp.ones((3, 3, 4, 7))},
        {"shape": (2, 3, 5, 5, 4)},
        {"input_dilation": 2, "padding": "VALID"},
        {"axis": "token"},
    ],
    ids=["one axis", "not square", "mask", "two batch axes", "dilated", "tokens"],
)
def test_other_convolutions_are_of_floats(kwargs, monkeypatch):
    monkeypatch.setattr(module, "_MOST_ROWS", None)
    assert not _convolves_integers(*_conv(**kwargs))
