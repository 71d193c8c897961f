"""What large arrays are computed by on one CPU: plain sums, and a branch to the exact formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.layers.conv.geometry import stored_pad_space

ROWS, FEATURES = 1040, 64


@pytest.fixture(autouse=True)
def _one_cpu(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def _branches(function, *args):
    text = jax.jit(function).lower(*args).as_text()
    return "stablehlo.case" in text or "stablehlo.while" in text


def _layer(module, name, dtype):
    rngs, sizes = nnx.Rngs(0), {"GroupNorm": {"num_groups": 4}}
    kwargs = sizes.get(name, {})
    return getattr(module, name)(FEATURES, param_dtype=dtype, **kwargs, rngs=rngs)


def _input(name, scale, mean):
    x = scale * np.random.default_rng(0).normal(size=(ROWS, FEATURES)) + mean
    # Of one row there is one element to a channel of an InstanceNorm.
    return np.float32(x.reshape(10, -1, FEATURES) if name == "InstanceNorm" else x)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm"])
@pytest.mark.parametrize(
    ("scale", "mean", "tolerance"),
    # A float32 square of 1e20 overflows; its gradient is of the order 1e-20.
    [(1, 0, 1e-6), (1, 3, 2e-6), (1, 1e4, 1e-6), (1e20, 0, 1e-6)],
    ids=["centered", "off center", "large mean", "huge"],
)
def test_normalizations_are_those_of_float64(name, scale, mean, tolerance):
    x = _input(name, scale, mean)
    g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def value_and_gradient(module, dtype):
        graphdef, params, statistics = nnx.split(_layer(module, name, dtype), nnx.Param, ...)
        statistics = jax.tree.map(lambda a: a.astype(dtype), statistics)

        def call(params, x):
            return nnx.merge(graphdef, params, statistics, copy=True)(x)

        def both(params, x, g):
            y, pull = jax.vjp(call, params, x)
            return y, pull(g)

        args = params, jnp.asarray(x, dtype), jnp.asarray(g, dtype)
        assert module is nnx or _branches(call, *args[:2])
        return jax.tree.leaves(jax.jit(both)(*args))

    found = value_and_gradient(fcg, jnp.float32)
    with jax.enable_x64(True):
        expected = value_and_gradient(nnx, jnp.float64)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5 * tolerance * np.abs(b).max())


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_without_an_epsilon_each_row_is_normalized_whatever_the_others_are(name):
    sizes = 10.0 ** np.linspace(-25, 25, ROWS)[:, None]
    x = np.float32(sizes * (np.random.default_rng(0).normal(size=(ROWS, FEATURES)) + 1))
    x[7] = 0
    layer = getattr(fcg, name)(FEATURES, epsilon=0.0, rngs=nnx.Rngs(0))
    y, pull = jax.vjp(layer, x)
    dx = pull(jnp.cos(y))[0]

    for found in (y, dx):
        np.testing.assert_array_equal(found[7], 0)
    x, y, dx = (np.delete(np.float64(a), 7, axis=0) for a in (x, y, dx))
    is_centered = name == "LayerNorm"
    d = x - is_centered * x.mean(-1, keepdims=True)
    size = np.sqrt((d**2).mean(-1, keepdims=True))
    x_hat, g = d / size, np.cos(d / size)
    rest = is_centered * g.mean(-1, keepdims=True)
    expected = g - rest - x_hat * (g * x_hat).mean(-1, keepdims=True)
    np.testing.assert_allclose(y, x_hat, atol=1e-5)
    np.testing.assert_allclose(dx * size, expected, atol=1e-5)


def test_of_a_single_element_the_mean_is_the_element():
    layer = fcg.InstanceNorm(FEATURES, rngs=nnx.Rngs(0))
    x = jnp.asarray(_input("rows", 1, 3))
    y, dx = jax.value_and_grad(lambda x: layer(x).sum())(x)
    assert (y, jnp.abs(dx).max()) == (0, 0)


ODD = np.float32([[0, 1, -np.inf, 2], [-np.inf] * 4, [np.inf, 1, np.inf, 2], [1, np.nan, 2, 3]])


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_rows_have_the_limits_that_few_of_them_have(name):
    function = getattr(fcg, name)
    rows = {"softmax": 17000, "log_softmax": 1 << 18}[name]
    x = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    x[500:504] = ODD

    def derivatives(x):
        y, pull = jax.vjp(function, x)
        (dx,) = pull(jnp.cos(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)))
        along = jax.jvp(function, (x,), (jnp.ones_like(x).at[:, 0].set(2),))[1]
        second = jax.grad(lambda x: jnp.sum(jax.vjp(function, x)[1](jnp.ones_like(x))[0] ** 2))(x)
        return y, dx, along, second

    assert _branches(function, x)
    assert not _branches(function, x[500:504])
    large, small = jax.jit(derivatives)(x), jax.jit(derivatives)(x[:504])
    for a, b in zip(large, small, strict=True):
        np.testing.assert_allclose(a[:504], b, rtol=1e-5, atol=1e-6)
    assert np.isfinite(large[1][500:503]).all()
    assert np.isfinite(large[3][500:503]).all()


@pytest.mark.parametrize(
    "loss", [fcg.softmax_cross_entropy_with_integer_labels, fcg.softmax_cross_entropy]
)
def test_losses_alone_have_the_limits_that_few_of_them_have(loss):
    x = np.random.default_rng(0).normal(size=(17000, 4)).astype(np.float32)
    x[500:504] = ODD
    labels = np.arange(len(x)) % 4
    if loss is fcg.softmax_cross_entropy:
        labels = np.eye(4, dtype=np.float32)[labels]
    assert _branches(loss, x, labels)
    assert not _branches(loss, x[500:504], labels[500:504])
    large, small = jax.jit(loss)(x, labels), jax.jit(loss)(x[:504], labels[:504])
    np.testing.assert_allclose(large[:504], small, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", [((1, 2),), ((0, 0), (3, 1)), ((2, 0), (0, 0))])
def test_images_are_padded_as_rows_of_numbers(padding):
    x = jnp.arange(2.0 * 3 * 4 * 5).reshape(2, *((12,) if len(padding) == 1 else (3, 4)), 5)
    expected = np.pad(x, ((0, 0), *padding, (0, 0)))
    # A context of its own: the call is traced once for all.
    with jax.make_user_context(default_value=False)(True):
        padded = jax.jit(lambda x: stored_pad_space(x, padding))
        np.testing.assert_array_equal(padded(x), expected)
        assert "x1xf32>" in padded.lower(x).as_text()
