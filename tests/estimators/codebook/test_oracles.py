"""Quantizers beside vector-quantize-pytorch; `tests/oracles/codebook.py` made the values."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

FROZEN = json.loads((Path(__file__).parents[2] / "oracles/codebook.json").read_text())["values"]
Z, CODES, COTANGENT, KERNEL = (
    jnp.array(FROZEN[name]) for name in ("z", "codes", "cotangent", "kernel")
)


def same(got, expected, **tolerances):
    np.testing.assert_allclose(got, np.asarray(expected), rtol=3e-6, atol=2e-6, **tolerances)


def applied(layer):
    def total(layer, z):
        out = layer(z)
        return jnp.sum(out.values * COTANGENT) + out.loss, out

    gradient = nnx.jit(nnx.grad(total, argnums=(0, 1), has_aux=True))
    (dlayer, dz), out = gradient(layer, Z)
    return dlayer, {**out._asdict(), "dz": dz}


def agrees(found, name):
    for part in FROZEN[name].keys() & found.keys():
        same(found[part], FROZEN[name][part])


def vector_quantizer(gradient):
    return fcg.VectorQuantizer(
        4,
        3,
        gradient=gradient,
        learning="ema",
        decay=0.9,
        codebook_init=lambda *_: CODES,
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_vector_quantizer(gradient):
    _, found = applied(vector_quantizer(gradient))
    agrees(found, gradient)


def test_moving_average():
    layer = vector_quantizer("rotation")
    indices = layer(Z).indices
    has_vectors = np.isin(np.arange(4), indices)
    assert not has_vectors.all()
    for name, expected in FROZEN["moving_average"].items():
        got = getattr(layer, name)[...]
        if name == "codebook":
            got, expected = got[has_vectors], np.asarray(expected)[has_vectors]
        same(got, expected)


def test_residual_vq():
    layer = fcg.ResidualVQ(2, 4, 3, learning="ema", rngs=nnx.Rngs(0))
    for i, stage in enumerate(layer.stages):
        stage.codebook[...] = CODES / 2**i
    agrees(nnx.jit(lambda m: m(Z))(layer)._asdict(), "residual")


def test_sim_vq():
    layer = fcg.SimVQ(4, 3, codebook_init=lambda *_: CODES, rngs=nnx.Rngs(0))
    layer.kernel[...] = KERNEL
    dlayer, found = applied(layer)
    agrees({**found, "dkernel": dlayer.kernel[...]}, "sim_vq")


def test_fsq():
    _, found = applied(fcg.FSQ((5, 4, 8)))
    agrees(found, "fsq")


def test_lfq():
    layer = fcg.LFQ(3, entropy_weight=0.5, diversity=0.7, temperature=2.0)
    _, found = applied(layer)
    indices = np.asarray(found.pop("indices"))
    agrees(found, "lfq")
    # The library has the bits in the other order.
    theirs = [f"{k:03b}"[::-1] for k in FROZEN["lfq"]["indices"]]
    assert [f"{k:03b}" for k in indices] == theirs


def test_a_code_without_vectors_stays_here_and_shrinks_there():
    expected = np.asarray(FROZEN["moving_average"]["codebook"])[3]
    layer = vector_quantizer("rotation")
    layer(Z)
    assert jnp.array_equal(layer.codebook[3], CODES[3])
    assert jnp.linalg.norm(expected) < jnp.linalg.norm(CODES[3])
