"""Ours beside the values that snntorch and spyx computed: `tests/oracles/spiking.py`."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_customgrad as fcg

VALUES = json.loads((Path(__file__).parents[2] / "oracles" / "spiking.json").read_text())["values"]


@pytest.mark.parametrize(("name", "slope"), [("fast_sigmoid", 5), ("atan", 3), ("triangular", 2)])
def test_surrogates(name, slope):
    surrogate = getattr(fcg.surrogate, name)
    with jax.enable_x64(True):
        u = jnp.array(VALUES["surrogates"]["u"])
        got = jax.grad(lambda u: surrogate(u, slope).sum())(u)
    # That of spyx is computed in float32.
    rtol = 1e-6 if name == "triangular" else 1e-13
    np.testing.assert_allclose(got, VALUES["surrogates"][name], rtol=rtol)


def cells(reset, reset_gradient=True):
    neurons = {"reset": reset, "reset_gradient": reset_gradient, "spike": fcg.surrogate.atan}
    tau_syn, tau_mem = (-1 / math.log(VALUES[name]) for name in ("current_decay", "decay"))
    return {
        "Leaky": fcg.Leaky(1, decay=VALUES["decay"], **neurons),
        "LIF": fcg.LIF(1, tau_syn=tau_syn, tau_mem=tau_mem, **neurons),
    }


def trajectory(cell, x):
    def step(carry, x):
        carry, spike = cell(carry, x)
        return carry, (spike, carry[-1] if isinstance(carry, tuple) else carry)

    _, (spikes, membrane) = lax.scan(step, cell.initialize_carry((1,)), x[:, None])
    return spikes[:, 0], membrane[:, 0]


def gradient(cell, x):
    weights = jnp.arange(1.0, len(x) + 1)
    return jax.grad(lambda x: trajectory(cell, x)[0] @ weights)(x)


@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("name", ["Leaky", "LIF"])
def test_cells(name, reset):
    cell, expected = cells(reset)[name], VALUES["cells"][name][reset]
    x = jnp.array(VALUES["input"])
    (spikes, membrane), dx = jax.jit(lambda x: (trajectory(cell, x), gradient(cell, x)))(x)
    np.testing.assert_array_equal(spikes, expected["spikes"])
    np.testing.assert_allclose(membrane, expected["membrane"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, expected["gradient"], rtol=1e-5, atol=1e-5)


def test_a_detached_reset():
    cell = cells("zero", reset_gradient=False)["Leaky"]
    expected = VALUES["cells"]["gradient of Leaky, detached reset to zero"]
    got = gradient(cell, jnp.array(VALUES["input"]))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
