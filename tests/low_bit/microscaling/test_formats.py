"""Elements, blocks and scales: every code, every tie, both ends."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flax_customgrad.low_bit.microscaling.mx_linear import MX
from flax_customgrad.low_bit.microscaling.nvfp4_linear import NVFP4
from flax_customgrad.low_bit.microscaling.scaled_blocks import (
    axes_in_blocks,
    decode_blocks,
    encode_blocks,
    join_blocks,
    split_blocks,
)
from flax_customgrad.low_bit.microscaling.scaled_linear import rotate_rows
from flax_customgrad.low_bit.microscaling.small_floats import (
    E2M1,
    E4M3,
    E5M2,
    decode_elements,
    encode_elements,
    round_to,
)

rounded = jax.jit(round_to, static_argnums=0)
encoded = jax.jit(encode_elements, static_argnums=0)
decoded = jax.jit(decode_elements, static_argnums=(0, 2))
ELEMENTS = pytest.mark.parametrize("element", [E4M3, E5M2, E2M1])


@functools.partial(jax.jit, static_argnums=0)
def quantize(form, x):
    return form.quantize(x, (1,))


def every_value(element):
    """The finite values of an element and their codes, as ml_dtypes has them; -0 is left out."""
    codes = np.arange(2 ** ml_dtypes.finfo(element).bits, dtype=np.uint8)
    values = codes.view(np.dtype(element)).astype(np.float64)
    real = np.isfinite(values) & ~((values == 0) & np.signbit(values))
    order = np.argsort(values[real])
    return values[real][order], codes[real][order]


@pytest.mark.smoke
@ELEMENTS
def test_every_code_is_a_value(element):
    values, codes = every_value(element)
    np.testing.assert_array_equal(decoded(element, codes, jnp.float32), values)
    np.testing.assert_array_equal(encoded(element, np.float32(values)), codes)


@ELEMENTS
@pytest.mark.parametrize("x64", [False, True])
def test_values_round_to_the_nearest_and_ties_to_the_even_code(element, x64):
    values, codes = every_value(element)
    ties = (values[1:] + values[:-1]) / 2
    even = np.where(codes[1:] % 2 == 0, values[1:], values[:-1])
    dtype = np.float64 if x64 else np.float32
    towards = np.nextafter(dtype(ties), dtype(np.inf)), np.nextafter(dtype(ties), dtype(-np.inf))
    most = values.max()
    beyond = np.array([most * 1.01, most * 100, 3e38, -3e38])
    given = np.concatenate([values, ties, *towards, beyond, [np.nan]])
    expected = [values, even, values[1:], values[:-1], [most, most, most, -most], [np.nan]]
    with jax.enable_x64(x64):
        got = rounded(element, jnp.asarray(given, dtype))
        assert got.dtype == dtype
    np.testing.assert_array_equal(got, np.concatenate(expected))


@ELEMENTS
def test_stochastic_rounding_goes_up_as_often_as_it_should(element):
    values, _ = every_value(element)
    low, high = values[:-1], values[1:]
    for share in (0.25, 0.75):
        v = low + share * (high - low)
        cases = ((share - 0.01, high), (share, low), (0.0, high), (0.999, low))
        noise = [np.full(v.shape, noise, np.float32) for noise, _ in cases]
        got = rounded(element, np.float32([v] * len(cases)), np.stack(noise))
        np.testing.assert_array_equal(got, [expected for _, expected in cases])
    noise = np.linspace(0, 0.999, len(values), dtype=np.float32)
    np.testing.assert_array_equal(rounded(element, np.float32(values), noise), values)


@pytest.mark.parametrize(("shape", "axes"), [((5, 7), (0,)), ((5, 7), (1,)), ((8, 7), (0, 1))])
def test_blocks_are_filled_up_with_zeros(shape, axes):
    x = np.arange(1, 1 + math.prod(shape), dtype=np.float32).reshape(shape)

    @jax.jit
    def there_and_back(x):
        blocks = split_blocks(x, axes, 4)
        return blocks, join_blocks(blocks, axes, jax.typeof(x))

    blocks, joined = there_and_back(x)
    assert all(blocks.shape[axis] == 4 for axis in axes_in_blocks(axes))
    assert np.asarray(blocks).sum() == x.sum()
    np.testing.assert_array_equal(joined, x)


@pytest.mark.parametrize("up", [True, False])
@ELEMENTS
def test_the_scale_of_mx_is_exact_beside_every_step(element, up):
    """Largest elements at powers of two and at the largest element's multiples, and beside them."""
    most = Fraction(float(ml_dtypes.finfo(element).max))
    places = math.floor(math.log2(most))
    steps = np.float32([float(f) * 2.0**k for k in (-110, -1, 0, 5, 100) for f in (1, most)])
    amax = np.concatenate([steps, np.nextafter(steps, 0), np.nextafter(steps, np.float32(np.inf))])
    scaled = quantize(MX(element, 2, up), np.stack([amax, -amax / 3], 1))
    scales, elements = np.int32(scaled.scales)[:, 0, 0], np.asarray(scaled.elements)[:, 0, 0]
    for a, e in zip(amax, scales - 127, strict=True):
        a, power = Fraction(float(a)), Fraction(2) ** int(e)
        assert most * power / 2 < a <= most * power if up else power <= a / 2**places < 2 * power
    quotients = np.clip(amax * np.exp2(127.0 - scales), 0, float(most))
    np.testing.assert_array_equal(elements, quotients.astype(element).astype(np.float32))


def test_the_ends_of_mx():
    inf, nan, top = np.inf, np.nan, np.finfo(np.float32).max
    x = np.float32([[0, 0], [-0.0, 0], [1e-44, 0], [2.0**-126, 0], [top, 1], [inf, 1], [1, nan]])
    for up in (True, False):
        form = MX(E4M3, 2, up)
        scaled = quantize(form, x)
        np.testing.assert_array_equal(
            np.asarray(scaled.scales)[:, 0, 0], [1, 1, 1, 1, 246, 255, 255]
        )
        values = np.asarray(form.rounded(x, (1,)))
        np.testing.assert_array_equal(values[:4], np.float32([[0, 0]] * 3 + [[2.0**-126, 0]]))
        np.testing.assert_array_equal(values[4], np.float32([448 * 2.0**119, 0]))
        assert np.isnan(values[5:]).all()


def exact_nvfp4(x, size):
    """Codes by fractions, along the last axis."""
    a = max(abs(Fraction(float(v))) for v in x.ravel())
    scales, elements = [], []
    for block in x.reshape(-1, size):
        b = max(abs(Fraction(float(v))) for v in block)
        scales.append(max(nearest(448 * b / a, E4M3), Fraction(1, 512)))
        elements += [nearest(2688 * Fraction(float(v)) / a / scales[-1], E2M1) for v in block]
    return np.array(list(map(float, scales))), np.array(list(map(float, elements)))


def nearest(v, element):
    values, codes = every_value(element)
    candidates = ((abs(Fraction(u) - v), c % 2, u) for u, c in zip(values, codes, strict=True))
    return Fraction(min(candidates)[2])


def test_nvfp4_is_exact_also_at_ties():
    """Small integers and data in bfloat16, whose quotients lie half way between elements often."""
    x = np.concatenate([np.arange(-24, 24), [1, 2, 3, 5] * 4]).reshape(-1, 4).astype(np.float32)
    x[3] = np.random.default_rng(0).standard_normal(4).astype(jnp.bfloat16)
    form = NVFP4(size=4)
    scaled = quantize(form, x)
    scales, elements = exact_nvfp4(x, 4)
    np.testing.assert_array_equal(np.ravel(decoded(E4M3, scaled.scales, jnp.float32)), scales)
    np.testing.assert_array_equal(np.abs(np.ravel(scaled.elements)), np.abs(elements))
    expected = (elements.reshape(-1, 4) * scales[:, None]).ravel() * 24 / 2688
    np.testing.assert_allclose(np.ravel(form.rounded(x, (1,))), expected, rtol=3e-7)


def test_the_ends_of_nvfp4():
    form, top = NVFP4(size=4), np.finfo(np.float32).max
    for x in (np.zeros((2, 4)), np.zeros((0, 4)), np.zeros((0, 0))):
        np.testing.assert_array_equal(form.rounded(np.float32(x), (1,)), x)
    for a in (top, 1e-35):
        x = np.float32([[a, a / 2, 0, -a / 3], [a * 2.0**-4, 0, 0, 0]])
        values = form.rounded(x, (1,))
        np.testing.assert_allclose(
            values, [[a, a / 2, 0, -a / 3], [a * 2.0**-4, 0, 0, 0]], rtol=2e-6
        )
    small = quantize(form, np.float32([[1, 0, 0, 0], [2.0**-17, 0, 0, 0], [2.0**-30, 0, 0, 0]]))
    np.testing.assert_array_equal(np.ravel(small.scales), [126, 2, 1])
    np.testing.assert_array_equal(np.asarray(small.elements)[:, 0, 0], [6, 6, 0])
    for bad in (np.inf, np.nan):
        assert np.isnan(form.rounded(np.float32([[1, bad, 0, 0], [1, 2, 3, 4]]), (1,))).all()


def test_the_transform_of_rows_is_orthonormal():
    x, one = np.random.default_rng(1).standard_normal((20, 3)), np.zeros((16, 1))
    one[5] = 4
    with jax.enable_x64(True):
        rotated, spread = jax.jit(lambda *arrays: tuple(map(rotate_rows, arrays)))(x, one)
        assert rotated.shape == (32, 3)
        rotated = np.asarray(rotated)
        np.testing.assert_allclose(rotated.T @ rotated, x.T @ x, rtol=1e-13)
        np.testing.assert_array_equal(np.abs(spread), np.ones((16, 1)))


@pytest.mark.parametrize("form", [MX(E4M3, 4), MX(E2M1, 4), NVFP4()], ids=["8 bits", "4", "NVFP4"])
def test_codes_stand_for_what_was_rounded(form):
    x = np.random.default_rng(2).standard_normal((6, 5), np.float32)

    @jax.jit
    def there_and_back(x):
        codes = encode_blocks(x, form)
        return codes.elements, codes.scales, decode_blocks(codes, form), form.rounded(x, (0,))

    elements, scales, values, expected = there_and_back(x)
    bits = ml_dtypes.finfo(form.element).bits
    assert elements.shape == (6, math.ceil(5 * bits / 8))
    assert elements.dtype == scales.dtype == jnp.uint8
    np.testing.assert_array_equal(values, expected)
