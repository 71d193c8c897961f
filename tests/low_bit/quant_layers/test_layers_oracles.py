"""Quantized layers against qwix, AQT and torchao, by frozen values."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

FILE = Path(__file__).parents[2] / "oracles" / "quantized.json"
FROZEN = json.loads(FILE.read_text())["values"]


def _quantizers(axis=None):
    return {
        "weight": fcg.FakeQuant(8, axis=-1),
        "activation": fcg.FakeQuant(8, axis=axis),
        "use_bias": False,
        "rngs": nnx.Rngs(0),
    }


def _check(layer, names, expected):
    x, kernel, g = (jnp.array(FROZEN[name]) for name in names)
    layer.kernel[...] = kernel

    @nnx.jit
    def value_and_gradient(layer, x):
        def weighed(layer, x):
            y = layer(x)
            return (y * g).sum(), y

        return nnx.value_and_grad(weighed, argnums=(0, 1), has_aux=True)(layer, x)

    (_, y), (dlayer, dx) = value_and_gradient(layer, x)
    found = {"y": y, "dx": dx, "dkernel": dlayer.kernel[...]}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].ravel(), value, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (
            lambda: fcg.QuantLinear(3, 2, residuals="original", **_quantizers()),
            FROZEN["qwix"]["original"],
        ),
        (lambda: fcg.QuantLinear(3, 2, **_quantizers()), FROZEN["qwix"]["quantized"]),
        (
            lambda: fcg.QuantLinear(3, 2, residuals="original", **_quantizers("token")),
            FROZEN["aqt"],
        ),
        (
            lambda: fcg.BitLinear(3, 2, norm=False, use_bias=False, rngs=nnx.Rngs(0)),
            FROZEN["torchao"],
        ),
    ],
    ids=["qwix, original", "qwix, quantized", "AQT", "torchao"],
)
def test_linear(layer, expected):
    _check(layer(), ("x", "kernel", "cotangent"), expected)


def test_conv():
    layer = fcg.QuantConv(1, 2, 2, padding="VALID", **_quantizers())
    _check(layer, ("signal", "window", "signal_cotangent"), FROZEN["qwix"]["conv"])
