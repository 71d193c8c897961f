"""Quantizers beside torch, Brevitas and torchao; `tests/oracles/quantizers.py` made the values."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

FROZEN = json.loads((Path(__file__).parents[2] / "oracles/quantizers.json").read_text())["values"]
X, COTANGENT = (jnp.array(FROZEN[name]) for name in ("x", "cotangent"))


def agrees(quantizer, name):
    def total(quantizer, x):
        y = quantizer(x)
        return jnp.sum(y * COTANGENT), y

    gradient = nnx.jit(nnx.grad(total, argnums=(0, 1), has_aux=True))
    (dquantizer, dx), y = gradient(quantizer, X)
    found = {"values": y, "dx": dx}
    if "dscale" in FROZEN[name]:
        found["dscale"] = dquantizer.scale[...].reshape(np.shape(FROZEN[name]["dscale"]))
    for part, expected in FROZEN[name].items():
        np.testing.assert_allclose(found[part], expected, rtol=3e-6, atol=1e-6, err_msg=part)


@pytest.mark.parametrize(
    ("name", "arguments", "scale"),
    [
        ("lsq", {}, "scale"),
        ("lsq, channels", {"axis": 0}, "scales"),
        ("lsq without a gradient scale", {"grad_scale": 1.0}, "scale"),
    ],
)
def test_lsq(name, arguments, scale):
    quantizer = fcg.LSQ(4, **arguments)
    scale = jnp.array(FROZEN[scale])
    quantizer.scale = nnx.Param(scale[:, None] if scale.ndim else scale)
    agrees(quantizer, name)


def test_affine():
    quantizer = fcg.FakeQuant(4, symmetric=False, dynamic=False)
    quantizer.observe(jnp.array([-9 * 0.22, 6 * 0.22]))
    agrees(quantizer, "affine")


def test_binary():
    mean = float(jnp.abs(X).mean())
    agrees(fcg.BinaryWeight(axis=None, clip_value=None), "binary")
    agrees(fcg.BinaryWeight(axis=None, clip_value=mean), "binary, clamped")


def test_codes_of_bitnet():
    codes = fcg.AbsMean().quantize(X)
    assert (codes.codes.astype(int) - 1).tolist() == FROZEN["ternary"]["codes"]
    np.testing.assert_allclose(codes.parameters[0].item(), FROZEN["ternary"]["scale"], rtol=1e-6)
    rows = fcg.FakeQuant(8, axis="token").quantize(X)
    assert (rows.codes.astype(int) - 127).tolist() == FROZEN["rows"]["integers"]
    np.testing.assert_allclose(rows.parameters[0].ravel(), FROZEN["rows"]["scales"], rtol=1e-6)
