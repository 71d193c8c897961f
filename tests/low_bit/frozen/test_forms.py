"""How kernels are stored in 4 bits: codes at every tie and bound, and what comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_customgrad.low_bit.frozen.int4 import Int4
from flax_customgrad.low_bit.frozen.nf4 import GROUP, LEVELS, NF4
from flax_customgrad.numerics.packing import unpack

FORMS = [
    NF4(3, double_quant=False),
    NF4(3),
    Int4(3),
    Int4(None),
    Int4(3, symmetric=False),
]
DTYPES = [jnp.float32, jnp.float16]


def column(*values, dtype=jnp.float64):
    return jnp.asarray(values, dtype)[:, None]


def codes(stored):
    return unpack(stored["codes"], 4, stored["scales"].shape[1])


def restored(form, w):
    return form.dequantize(form.quantize(w))


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def test_nf4_levels_midpoints_and_their_neighbours():
    levels = np.asarray(LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    above, below = np.nextafter(midpoints, 2), np.nextafter(midpoints, -2)
    with jax.enable_x64(True):
        form = NF4(16, double_quant=False)
        w = jnp.stack([jnp.append(v, 1.0) for v in (levels[:-1], midpoints, above, below)], 1)
        found = codes(form.quantize(w))
        np.testing.assert_array_equal(form.dequantize(form.quantize(w))[:, 0], levels)
    low, high = [*range(15), 15], [*range(1, 16), 15]
    np.testing.assert_array_equal(found.T, [low, low, high, low])


def test_int4_ties_go_to_the_even_integer():
    halves = np.arange(-6.5, 7)
    with jax.enable_x64(True):
        stored = Int4(None).quantize(column(-7.0, *halves, 7.0))
        np.testing.assert_array_equal(stored["scales"], [[1.0]])
    expected = [-7, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 7]
    np.testing.assert_array_equal(codes(stored)[:, 0], np.add(expected, 8))


def test_int4_with_a_zero_point():
    with jax.enable_x64(True):
        form = Int4(None, symmetric=False)
        # The range is [-5, 10], in steps of 1, and [0, 15] for weights of one sign.
        w = jnp.stack([column(-5, -4.5, -0.5, 0, 0.5, 1.5, 10), column(15, 3, 3, 4, 5, 6, 7)], 1)
        stored = form.quantize(w[..., 0])
        np.testing.assert_array_equal(unpack(stored["zeros"], 4, 2), [[5, 0]])
        np.testing.assert_array_equal(codes(stored)[:, 0], [0, 1, 5, 5, 5, 7, 15])
        np.testing.assert_array_equal(form.dequantize(stored)[:, 1], [15, 3, 3, 4, 5, 6, 7])
        np.testing.assert_array_equal(restored(form, -w[..., 0])[:, 1], -w[:, 1, 0])


def test_double_quantization_of_the_scales():
    """Each output is one block; 257 outputs are two groups, the second with one deviation."""
    scales = np.random.default_rng(0).uniform(0.5, 2, GROUP + 1)
    with jax.enable_x64(True):
        stored = NF4(2).quantize(jnp.asarray([scales, -scales / 2]))
        deviation = scales - scales.mean()
        groups = np.split(deviation, [GROUP])
        steps = [np.abs(group).max() / 127 for group in groups]
        expected = [np.round(group / step) for group, step in zip(groups, steps, strict=True)]
        assert stored["scales"].dtype == jnp.int8
        np.testing.assert_allclose(stored["scale_mean"], scales.mean(), rtol=1e-15)
        np.testing.assert_allclose(stored["scale_steps"], [steps], rtol=1e-14)
        np.testing.assert_array_equal(stored["scales"][0], np.concatenate(expected))
        error = np.abs(NF4(2).dequantize(stored)[0] - scales)
        assert np.all(error <= np.repeat(steps, [GROUP, 1]) / 2 + 1e-15)


def test_a_scale_is_never_negative():
    """The mean is 8.33 and the step 91.67 / 127: the smallest scales are 12 steps below, -0.33."""
    w = jnp.array([[100.0, *[0.0] * 11]])
    stored = NF4(1).quantize(w)
    assert stored["scale_mean"] + stored["scales"][0, 1] * stored["scale_steps"][0, 0] < -0.3
    back = restored(NF4(1), w.at[0, 1:].set(1e-3))
    assert bool(jnp.all(back >= 0))
    np.testing.assert_allclose(back[0, 0], 100, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_back(form, dtype):
    """An odd shape, whose last block has one weight, and the dtype of the weights."""
    w = normal(7, 5, dtype=dtype)
    stored = form.quantize(w)
    assert set(stored) == set(form.parts)
    assert stored["codes"].dtype == jnp.uint8
    assert stored["codes"].shape == (7, 3)
    assert stored["scales"].shape == (1 if form == Int4(None) else 3, 5)
    back = form.dequantize(stored)
    assert back.dtype == dtype
    assert back.shape == w.shape
    # Half the widest gap between levels, of the largest weight.
    widest = 0.16 if isinstance(form, NF4) else 0.08
    largest = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=0)
    error = jnp.abs(back.astype(jnp.float32) - w.astype(jnp.float32))
    assert bool(jnp.all(error <= widest * largest + 0.02))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_came_back_stays(form):
    if form != NF4(3):  # whose quantized scales have moved
        with jax.enable_x64(True):
            once = restored(form, normal(7, 5, dtype=jnp.float64))
            np.testing.assert_allclose(restored(form, once), once, rtol=1e-14)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zeros_stay_zeros(form):
    np.testing.assert_array_equal(restored(form, jnp.zeros((7, 5))), 0)
    w = normal(7, 5).at[3:6].set(0).at[:, 1].set(0).at[0].set(0)
    back = restored(form, w)
    assert bool(jnp.all(back[w == 0] == 0))
    assert bool(jnp.all(jnp.isfinite(back)))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_weights(form, dtype):
    limits = jnp.finfo(dtype)
    for extreme in (limits.max, limits.tiny, limits.smallest_subnormal):
        w = jnp.sign(normal(7, 5)).astype(dtype) * extreme
        back = restored(form, w)
        assert bool(jnp.all(jnp.isfinite(back))), extreme
        if extreme == limits.max:
            np.testing.assert_allclose(*map(np.float64, (back, w)), rtol=0.07)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
def test_a_weight_that_is_not_finite_is_never_a_finite_one(form, bad):
    back = restored(form, normal(7, 5).at[3, 2].set(bad))
    assert not jnp.isfinite(back[3, 2])
