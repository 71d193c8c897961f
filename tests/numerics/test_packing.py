"""Codes of a few bits: where each lies in its byte, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_customgrad.numerics.packing import (
    masked,
    pack_bits,
    pack_mask,
    packed_width,
    unpack_bits,
    unpack_mask,
)


@pytest.mark.smoke
def test_the_first_code_is_in_the_lowest_bits():
    assert pack_bits(jnp.array([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    assert pack_bits(jnp.array([1, 2, 3, 0, 1]), 2).tolist() == [0b00111001, 1]
    assert pack_bits(jnp.array([1, 0, 0, 1]), 1).tolist() == [0b1001]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (2, 7), (3, 16)])
def test_packing_is_undone(bits, shape):
    codes = np.random.default_rng(0).integers(0, 2**bits, shape)

    @jax.jit
    def there_and_back(codes):
        packed = pack_bits(codes, bits)
        return packed, unpack_bits(packed, bits, shape[-1])

    packed, unpacked = there_and_back(codes)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    np.testing.assert_array_equal(unpacked, codes)
    if bits == 1:
        np.testing.assert_array_equal(packed, np.packbits(codes, axis=-1, bitorder="little"))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 7), (3, 16), (2, 19)])
def test_a_mask_takes_a_bit_an_element(shape):
    mask = jnp.asarray(np.random.default_rng(1).random(shape) < 0.5)
    g = jnp.asarray(np.random.default_rng(2).normal(size=shape))
    packed = pack_mask(mask)
    if shape:
        assert packed.dtype == jnp.uint8
        assert packed.shape == (*shape[:-1], -(-shape[-1] // 8))
        np.testing.assert_array_equal(unpack_mask(packed, shape[-1]), mask)
    np.testing.assert_array_equal(masked(g, packed), np.where(mask, g, 0))


def test_a_code_takes_the_next_power_of_two():
    assert [packed_width(bits) for bits in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert packed_width(9) == packed_width(16) == 16
    for bits in (0, 17):
        with pytest.raises(ValueError, match="1 to 16 bits"):
            packed_width(bits)
