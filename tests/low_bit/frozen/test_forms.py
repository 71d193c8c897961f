"""How kernels are stored in 4 bits: codes at every tie and bound, and what comes back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_customgrad.low_bit.frozen.int4 import Int4
from flax_customgrad.low_bit.frozen.nf4 import GROUP, LEVELS, NF4
from flax_customgrad.numerics.packing import unpack_bits

FORMS = [
    NF4(3, double_quant=False),
    NF4(3),
    Int4(3),
    Int4(None),
    Int4(3, symmetric=False),
]
DTYPES = [jnp.float32, jnp.float16]


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@partial(jax.jit, static_argnums=0)
def stored_and_restored(form, w):
    """What is stored, with its codes and zero points a byte each; and what comes back."""
    stored, m = form.quantize(w), w.shape[1]
    each = {name: unpack_bits(stored[name], 4, m) for name in ("codes", "zeros") if name in stored}
    return stored, each, form.dequantize(stored)


def restored(form, w):
    return np.asarray(stored_and_restored(form, w)[2])


@pytest.mark.smoke
def test_nf4_levels_midpoints_and_their_neighbours():
    levels = np.asarray(LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    above, below = np.nextafter(midpoints, 2), np.nextafter(midpoints, -2)
    w = np.stack([np.append(v, 1.0) for v in (levels[:-1], midpoints, above, below)], 1)
    with jax.enable_x64(True):
        _, each, back = stored_and_restored(NF4(16, double_quant=False), w)
    np.testing.assert_array_equal(np.asarray(back)[:, 0], levels)
    low, high = [*range(15), 15], [*range(1, 16), 15]
    np.testing.assert_array_equal(np.transpose(each["codes"]), [low, low, high, low])


def test_int4_ties_go_to_the_even_integer():
    halves = np.arange(-6.5, 7)
    with jax.enable_x64(True):
        stored, each, _ = stored_and_restored(Int4(None), np.array([-7.0, *halves, 7.0])[:, None])
    np.testing.assert_array_equal(stored["scales"], [[1.0]])
    expected = [-7, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 7]
    np.testing.assert_array_equal(each["codes"], np.add(expected, 8)[:, None])


def test_int4_with_a_zero_point():
    form = Int4(None, symmetric=False)
    # The range is [-5, 10], in steps of 1, and [0, 15] for weights of one sign.
    w = np.array([[-5, -4.5, -0.5, 0, 0.5, 1.5, 10], [15, 3, 3, 4, 5, 6, 7]]).T
    with jax.enable_x64(True):
        _, each, back = stored_and_restored(form, w)
        np.testing.assert_array_equal(each["zeros"], [[5, 0]])
        np.testing.assert_array_equal(np.asarray(each["codes"])[:, 0], [0, 1, 5, 5, 5, 7, 15])
        np.testing.assert_array_equal(np.asarray(back)[:, 1], [15, 3, 3, 4, 5, 6, 7])
        np.testing.assert_array_equal(restored(form, -w)[:, 1], -w[:, 1])


def test_double_quantization_of_the_scales():
    """Each output is one block; 257 outputs are two groups, the second with one scale."""
    scales = np.random.default_rng(0).uniform(0.5, 2, GROUP + 1)
    with jax.enable_x64(True):
        stored, _, back = stored_and_restored(NF4(2), np.array([scales, -scales / 2]))
    ends = [[group.min(), group.max()] for group in np.split(scales, [GROUP])]
    np.testing.assert_allclose(stored["scale_range"], ends, rtol=1e-15)
    assert stored["scales"].dtype == jnp.uint8
    low, high = ends[0]
    place = np.log(scales[:GROUP] / low) / np.log(high / low)
    np.testing.assert_array_equal(stored["scales"][0, :GROUP], np.round(255 * place))
    relative = np.asarray(back)[0] / scales
    assert np.abs(np.log(relative[:GROUP])).max() <= np.log(high / low) / 509
    np.testing.assert_allclose(relative[GROUP], 1, rtol=1e-15)


@pytest.mark.parametrize("outlier", [1, 10, 100, 1000, 1e30])
@pytest.mark.parametrize("of", ["output", "weight", "input"])
def test_an_outlier_spoils_no_other_scale(outlier, of):
    """With scales as they are the error is at most that of bitsandbytes, whose blocks are these."""
    w = normal(256, 512)
    where = {"output": np.s_[:, 100], "weight": np.s_[77, 100], "input": np.s_[77]}[of]
    w[where] *= np.float32(outlier)
    others = np.ones_like(w)
    others[where] = 0
    error = {}
    for double_quant in (True, False):
        difference = (restored(NF4(64, double_quant), w) - w) / np.abs(w).max()
        error[double_quant] = np.linalg.norm(difference * others)
    assert error[True] <= 1.01 * error[False]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-7, 3e-7, 1e-6, 1e-4])
def test_small_weights_in_float16_are_right_to_half_a_step(size, symmetric):
    """A scale of 1e-7 / 7 is none that float16 has: it is rounded up, and clips nothing."""
    w = (size * normal(64, 3)).astype(np.float16)
    stored, _, back = stored_and_restored(Int4(16, symmetric), w)
    scales = np.asarray(stored["scales"], np.float64)
    blocks = w.astype(np.float64).reshape(4, 16, 3)
    least, largest = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    steps = np.maximum(-least, largest) / 7 if symmetric else (largest - least) / 15
    assert (scales <= 1.001 * steps + 2**-24).all()
    error = np.abs(np.asarray(back, np.float64).reshape(blocks.shape) - blocks)
    assert (error <= 0.51 * scales[:, None]).all()


def test_scales_of_all_sizes_and_blocks_of_zeros():
    """Scales from the least normal number to the largest are next to each other, and none."""
    w = np.float32([[2.0**-126, 3e38, 0.0, 1e-3, 0.0, -1e-20]])
    back = restored(NF4(1), w)
    np.testing.assert_array_equal(back == 0, w == 0)
    np.testing.assert_array_equal(np.sign(back), np.sign(w))
    # 254 octaves in 255 steps.
    assert np.abs(np.log2(back[w != 0] / w[w != 0])).max() < 0.51
    np.testing.assert_array_equal(restored(NF4(1), np.zeros((3, 2), np.float32)), 0)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_back(form, dtype):
    """An odd shape, whose last block has one weight, and the dtype of the weights."""
    w = normal(7, 5, dtype=dtype)
    stored, _, back = stored_and_restored(form, w)
    assert set(stored) == set(form.parts)
    assert stored["codes"].dtype == jnp.uint8
    assert stored["codes"].shape == (7, 3)
    assert stored["scales"].shape == (1 if form == Int4(None) else 3, 5)
    assert back.dtype == dtype
    assert back.shape == w.shape
    # Half the widest gap between levels, of the largest weight.
    widest = 0.16 if isinstance(form, NF4) else 0.08
    error = np.abs(np.float32(back) - np.float32(w))
    assert np.all(error <= widest * np.max(np.abs(np.float32(w)), axis=0) + 0.02)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_came_back_stays(form):
    if form != NF4(3):  # whose quantized scales have moved
        with jax.enable_x64(True):
            once = restored(form, normal(7, 5, dtype=np.float64))
            np.testing.assert_allclose(restored(form, once), once, rtol=1e-14)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zeros_and_weights_that_are_not_finite(form):
    """Zeros stay zeros, and what is infinite or NaN is never a finite weight."""
    np.testing.assert_array_equal(restored(form, np.zeros((7, 5), np.float32)), 0)
    w = normal(7, 5)
    w[3:6], w[:, 1], w[0] = 0, 0, 0
    back = restored(form, w)
    assert np.all(back[w == 0] == 0)
    assert np.all(np.isfinite(back))
    for bad in (np.inf, -np.inf, np.nan):
        w = normal(7, 5)
        w[3, 2] = bad
        assert not np.isfinite(restored(form, w)[3, 2])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_weights(form, dtype):
    limits = jnp.finfo(dtype)
    for extreme in (limits.max, limits.tiny, limits.smallest_subnormal):
        w = np.sign(normal(7, 5)).astype(dtype) * extreme.astype(dtype)
        back = restored(form, w)
        assert np.all(np.isfinite(back)), extreme
        if extreme == limits.max:
            np.testing.assert_allclose(*map(np.float64, (back, w)), rtol=0.07)
