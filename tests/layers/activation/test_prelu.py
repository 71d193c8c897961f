"""PReLU takes the place of nnx's: constructor, parameters, results, injections."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


@nnx.jit
def results(layers, xs):
    """Value and gradients of each layer at each input."""

    def loss(layer, x):
        return jnp.sum(jnp.sin(layer(x).astype(jnp.float32)) * 0.5)

    return [
        [(layer(x), *jax.tree.leaves(nnx.grad(loss, argnums=(0, 1))(layer, x))) for x in xs]
        for layer in layers
    ]


def test_it_is_the_layer_of_nnx():
    assert issubclass(fcg.PReLU, nnx.PReLU)
    for method in ("__init__", "__call__"):
        ours, theirs = (inspect.signature(getattr(m.PReLU, method)) for m in (fcg, nnx))
        assert list(ours.parameters) == list(theirs.parameters)
    layers = [m.PReLU(0.2, negative_slope_metadata={"tag": 1}) for m in (fcg, nnx)]
    ours, theirs = map(nnx.state, layers)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert vars(layers[0]).keys() == vars(layers[1]).keys()


def test_dtypes():
    halves_and_float32 = (jnp.float32, jnp.bfloat16, jnp.float16)
    ours, theirs = (
        [
            m.PReLU(0.3, dtype=dtype, param_dtype=param_dtype)
            for dtype in (None, jnp.float32, jnp.bfloat16)
            for param_dtype in halves_and_float32
        ]
        for m in (fcg, nnx)
    )
    xs = [jax.random.normal(jax.random.key(0), (8, 3), dtype) for dtype in halves_and_float32]
    for of_ours, of_theirs in zip(results(ours, xs), results(theirs, xs), strict=True):
        for (y, *gradients), (their_y, *their_gradients) in zip(of_ours, of_theirs, strict=True):
            assert y.dtype == their_y.dtype
            np.testing.assert_array_equal(y, their_y)
            for a, b in zip(gradients, their_gradients, strict=True):
                assert a.dtype == b.dtype
                a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
                np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-2)


def test_value_and_gradients_in_float64():
    slopes = [np.array(slope) for slope in (0.3, [0.1, 0.2, 0.3], [[0.1], [0.2]])]
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (4, 2, 3), jnp.float64).at[0, 0, 0].set(0)
        ours, theirs = (
            results([m.PReLU(slope, param_dtype=jnp.float64) for slope in slopes], [x])
            for m in (fcg, nnx)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("x", [jnp.arange(-2, 3), np.float32([-1, 1]), 1j * jnp.ones(2)], ids=str)
def test_other_inputs(x):
    try:
        expected = nnx.PReLU()(x)
    except Exception as error:
        with pytest.raises(type(error)):
            fcg.PReLU()(x)
    else:
        np.testing.assert_array_equal(fcg.PReLU()(x), expected)


def test_an_injected_operation_is_honoured():
    def halved(arrays, *, dtype=None):
        return tuple(a / 2 for a in arrays)

    x = jax.random.normal(jax.random.key(0), (8, 3))
    layers = [m.PReLU(dtype=jnp.float32, promote_dtype=halved) for m in (fcg, nnx)]
    ours, theirs = results(layers, [x])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.smoke
def test_infinite_inputs():
    x = jnp.array([-jnp.inf, jnp.inf])
    np.testing.assert_array_equal(fcg.PReLU(0.5)(x), x)
    gradient = jax.grad(lambda x: jnp.sum(fcg.PReLU(0.5)(x)))(x)
    np.testing.assert_array_equal(gradient, [0.5, 1])


def test_forward_mode_needs_use_autodiff():
    x = jnp.array([-1.0, 2.0])
    with fcg.use_autodiff():
        np.testing.assert_array_equal(jax.jvp(fcg.PReLU(0.5), (x,), (x,))[1], [-0.5, 2])


def test_convert_takes_it():
    converted = fcg.convert(nnx.Sequential(nnx.PReLU()))
    assert type(converted.layers[0]) is fcg.PReLU
