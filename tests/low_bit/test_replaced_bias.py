"""Biases of another shape, put into a layer by hand: broadcast as nnx does, or refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

X = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)


def made(cls, *args, **kwargs):
    return lambda: cls(*args, **kwargs, rngs=nnx.Rngs(0))


LAYERS = {
    "QuantLinear": made(fcg.QuantLinear, 4, 3, weight=fcg.FakeQuant(8)),
    "QuantLinearGeneral": made(fcg.QuantLinearGeneral, 4, (2, 3)),
    "QuantConvTranspose": made(fcg.QuantConvTranspose, 4, 3, 3, transpose_kernel=True),
    "Int8Linear": made(fcg.Int8Linear, 4, 3, backward="int8"),
    "Int8Conv": made(fcg.Int8Conv, 4, 3, 3),
    "Fp8Linear": made(fcg.Fp8Linear, 4, 3),
    "MXLinear": made(fcg.MXLinear, 4, 3),
    "NF4Linear": made(fcg.NF4Linear, 4, 3),
    "QLoRALinear": made(fcg.QLoRALinear, 4, 3, lora_rank=2, train_bias=True),
}


def value_and_gradient(layer, bias):
    layer.bias = nnx.Param(bias)
    value, found = nnx.value_and_grad(lambda layer: jnp.sum(jnp.square(layer(X))))(layer)
    return value, found["bias"][...]


@pytest.mark.parametrize("name", LAYERS)
def test_a_bias_that_broadcasts_is_broadcast(name):
    make = LAYERS[name]
    own = make().bias.shape
    value, dbias = value_and_gradient(make(), jnp.full(own, 0.5))
    for shape in ((1, *own), (1,), ()):
        got, of_shape = value_and_gradient(make(), jnp.full(shape, 0.5))
        np.testing.assert_allclose(got, value, rtol=1e-6)
        expected = dbias if len(shape) > len(own) else jnp.sum(dbias)
        np.testing.assert_allclose(of_shape, jnp.reshape(expected, shape), rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_bias_that_does_not_broadcast_is_refused(name):
    layer = LAYERS[name]()
    layer.bias = nnx.Param(jnp.zeros(5))
    with pytest.raises(ValueError, match=r"the bias has shape \(5,\).*give it that shape"):
        layer(X)


@pytest.mark.parametrize("name", LAYERS)
def test_a_bias_that_is_switched_off_is_not_added(name):
    layer = LAYERS[name]()
    expected = layer(X)  # whose bias is zero
    layer.bias, layer.use_bias = nnx.Param(jnp.ones(layer.bias.shape)), False
    np.testing.assert_array_equal(layer(X), expected)


@pytest.mark.parametrize("cls", [fcg.QuantEinsum, fcg.Fp8Einsum])
def test_a_bias_of_an_einsum_has_as_many_elements_as_the_kernel_has_outputs(cls):
    layer = cls("nta,ab->ntb", (4, 3), (3,), rngs=nnx.Rngs(0))
    layer.bias = nnx.Param(jnp.ones((1, 1, 3)))
    assert layer(X).shape == (2, 6, 3)
    for shape in ((), (1,), (2,)):
        layer.bias = nnx.Param(jnp.ones(shape))
        with pytest.raises(ValueError, match=r"the bias has shape .* outputs of shape \(3,\)"):
            layer(X)
