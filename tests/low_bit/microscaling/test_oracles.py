"""Codes beside torchao's; `tests/oracles/microscaling.py` made the values."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_customgrad.low_bit.microscaling.mx_linear import MX
from flax_customgrad.low_bit.microscaling.nvfp4_linear import NVFP4
from flax_customgrad.low_bit.microscaling.small_floats import E2M1, E4M3, E5M2, encode_elements
from flax_customgrad.numerics.packing import pack_bits

HERE = Path(__file__).parents[2] / "oracles/microscaling.json"
FROZEN = json.loads(HERE.read_text())["values"]
ELEMENTS = {"e4m3": E4M3, "e5m2": E5M2, "e2m1": E2M1}


@functools.partial(jax.jit, static_argnums=0)
def quantize(form, x):
    return form.quantize(x, (0,))


def agrees(scaled, element, expected):
    packed = jax.jit(lambda v: pack_bits(encode_elements(element, v), jnp.finfo(element).bits))(
        np.ravel(scaled.elements)
    )
    np.testing.assert_array_equal(np.ravel(scaled.scales), expected["scales"])
    np.testing.assert_array_equal(packed, expected["codes"])


@pytest.mark.parametrize("name", [name for name in FROZEN if name[:4] in ELEMENTS])
def test_mx(name):
    element, rounding = name.split("_")
    form = MX(ELEMENTS[element], 4, rounding == "up")
    agrees(quantize(form, np.float32(FROZEN["x"])), form.element, FROZEN[name])


@pytest.mark.smoke
def test_nvfp4():
    scaled = quantize(NVFP4(), np.float32(FROZEN["y"]))
    agrees(scaled, E2M1, FROZEN["nvfp4"])
    # Here the factor is that of values below 2, and not of elements times scales.
    np.testing.assert_allclose(scaled.factor, FROZEN["nvfp4"]["factor"] * 2.0**11, rtol=1e-6)
