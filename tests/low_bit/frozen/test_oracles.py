"""Kernels in 4 bits against torchao and qwix: their values, frozen by tests/oracles/freeze.py."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from flax_customgrad.low_bit.frozen.int4 import Int4
from flax_customgrad.low_bit.frozen.nf4 import NF4
from flax_customgrad.numerics.packing import unpack_bits

FROZEN = json.loads((Path(__file__).parents[2] / "oracles" / "frozen.json").read_text())["values"]
KERNEL = jnp.asarray(FROZEN["kernel"]).reshape(8, 2)


def codes(stored):
    return unpack_bits(stored["codes"], 4, 2).astype(int).ravel()


def test_nf4_with_double_quantization_is_torchao_s():
    expected, stored = FROZEN["nf4"], NF4(8).quantize(KERNEL)
    np.testing.assert_array_equal(codes(stored), expected["codes"])
    # Theirs has 128 steps where ours has 127, and clips one.
    np.testing.assert_allclose(
        NF4(8).dequantize(stored).ravel(), expected["kernel"], atol=1.5 * expected["step"]
    )


def test_nf4_in_blocks_is_qwix_s():
    expected, stored = FROZEN["nf4_blocks"], NF4(4, double_quant=False).quantize(KERNEL)
    np.testing.assert_array_equal(codes(stored), expected["codes"])
    np.testing.assert_allclose(stored["scales"].ravel(), expected["scales"], rtol=1e-6)


def test_int4_is_torchao_s():
    expected, stored = FROZEN["int4"], Int4(4).quantize(KERNEL)
    np.testing.assert_array_equal(codes(stored) - 8, expected["codes"])
    np.testing.assert_allclose(stored["scales"].ravel(), expected["scales"], rtol=1e-6)
    np.testing.assert_allclose(Int4(4).dequantize(stored).ravel(), expected["kernel"], rtol=1e-6)


def test_int4_with_a_zero_point_is_torchao_s():
    form, expected = Int4(4, symmetric=False), FROZEN["int4_affine"]
    stored = form.quantize(KERNEL)
    np.testing.assert_array_equal(codes(stored), expected["codes"])
    np.testing.assert_array_equal(unpack_bits(stored["zeros"], 4, 2).ravel(), expected["zeros"])
    np.testing.assert_allclose(stored["scales"].ravel(), expected["scales"], rtol=1e-6)
    np.testing.assert_allclose(form.dequantize(stored).ravel(), expected["kernel"], rtol=1e-6)
