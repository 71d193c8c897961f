"""Products in int8 against torchao, AQT and qwix, by their frozen values."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.low_bit.int8.int8_codes import encode_int8

FROZEN = json.loads((Path(__file__).parents[2] / "oracles" / "int8.json").read_text())["values"]


def found(name):
    return {key: np.array(value) for key, value in FROZEN[name].items()}


def gradients(layer, kernel, x, g):
    layer.kernel[...] = jnp.array(FROZEN[kernel])
    graphdef, state = nnx.split(layer, nnx.Param)
    x, g = jnp.array(FROZEN[x]), jnp.array(FROZEN[g])

    @jax.jit
    def run(state, x, g):
        y, pull = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
        return y, *pull(g)

    y, grads, dx = run(state, x, g)
    return {"y": y, "dx": dx, "dkernel": grads["kernel"][...]}


def linear(**kwargs):
    layer = fcg.Int8Linear(4, 2, use_bias=False, **kwargs, rngs=nnx.Rngs(0))
    return gradients(layer, "kernel", "x", "cotangent")


def conv(**kwargs):
    layer = fcg.Int8Conv(2, 2, (2,), padding="VALID", use_bias=False, **kwargs, rngs=nnx.Rngs(0))
    return gradients(layer, "window", "images", "image_cotangent")


@pytest.mark.smoke
def test_the_codes_of_torchao():
    expected = found("torchao")
    a = jax.jit(lambda x: encode_int8(x, -1))(jnp.array(FROZEN["x"]))
    np.testing.assert_array_equal(a.codes.ravel(), expected["codes"])
    np.testing.assert_allclose(a.scale.ravel(), expected["scale"], rtol=1e-7)


@pytest.mark.parametrize(
    ("library", "ours"),
    [
        ("torchao", lambda: linear(residuals="original")),
        ("aqt", lambda: linear(backward="int8")),
        ("qwix_original", lambda: linear(residuals="original")),
        ("qwix_conv", lambda: conv(backward="int8")),
    ],
)
def test_products_and_gradients(library, ours):
    expected = found(library)
    for name, value in ours().items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(value.ravel(), expected[name], atol=1e-6 * scale, rtol=0)
