"""FakeQuant: codes at every tie and bound, each calibration, and what it records."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

NAN, INF = float("nan"), float("inf")


def _recorded(x, **kwargs):
    quantizer = fcg.FakeQuant(dynamic=False, **kwargs)
    quantizer.observe(jnp.array(x))
    return quantizer


@pytest.mark.parametrize("bits", [2, 8])
def test_codes_at_every_tie_and_both_bounds(bits):
    high = 2 ** (bits - 1) - 1
    # 0.3 is no power of two: a quotient that is rounded twice misses ties.
    for high_end in (0.5 * high, 0.3 * high, 0.7 * high):
        quantizer = _recorded([high_end], bits=bits)
        halves = np.arange(-high - 1, high + 1, dtype=np.float32) + np.float32(0.5)
        codes = quantizer.quantize(jnp.zeros(1))
        s = np.float32(codes.parameters[0].item())
        ties = halves * s
        x = np.concatenate([ties, np.nextafter(ties, 9), np.nextafter(ties, -9), [9, -9]])
        v = x.astype(np.float32) / s
        got = nnx.jit(lambda q, x: q.quantize(x)[:2])(quantizer, jnp.array(x, jnp.float32))
        expected = np.clip(np.round(v), -high, high)
        np.testing.assert_array_equal(got[1].astype(int) - high, expected)
        np.testing.assert_array_equal(got[0], (expected * s).astype(np.float32))


@pytest.mark.smoke
def test_affine_codes_and_the_gradient_of_what_the_range_holds():
    quantizer = _recorded([-0.5, 1.0], bits=2, symmetric=False)
    x = jnp.array([-0.76, -0.5, -0.25, 0.0, 0.25, 0.75, 1.0, 1.01])

    @jax.jit
    def program(x):
        return quantizer.quantize(x)[:2], jax.grad(lambda x: quantizer(x).sum())(x)

    (values, codes), dx = program(x)
    np.testing.assert_array_equal(codes, [0, 0, 1, 1, 1, 3, 3, 3])
    np.testing.assert_array_equal(values, [-0.5, -0.5, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(dx, [0, 1, 1, 1, 1, 1, 1, 0])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gradient_passes_at_the_ends_of_what_was_observed(bits, symmetric):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((200, 5)) + rng.standard_normal((200, 1)), jnp.float32)
    quantizer = _recorded(x, bits=bits, symmetric=symmetric, axis=0)

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: quantizer(x).sum())(x)

    np.testing.assert_array_equal(gradient(x), np.ones_like(x))
    # Beyond the recorded range, and the values that stand for it, there is none.
    largest, step = np.abs(x).max(1, keepdims=True), np.ptp(x, 1, keepdims=True) / (2**bits - 1)
    for side in (-1, 1):
        np.testing.assert_array_equal(gradient(side * (largest + step) * 1.01), np.zeros((200, 1)))


@pytest.mark.parametrize("n", [1, 2, 37, 1000])
@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 100.0])
def test_a_percentile_is_numpy_s_in_every_program(n, percent):
    x = np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)
    quantizer = fcg.FakeQuant(8, calibration="percentile", percentile=percent, axis=-1)
    scale = quantizer.quantize(x).parameters[0]
    expected = np.percentile(np.abs(x.astype(np.float64)), percent, 0) / 127
    np.testing.assert_allclose(scale[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(lambda x: quantizer.quantize(x).parameters[0])(x), scale)


@pytest.mark.parametrize("calibration", ["absmax", "percentile", "moving_average"])
@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_what_is_not_finite_is_left_out_of_a_recorded_range(calibration, axis, bad):
    x = jnp.array([[0.5, -1.0], [0.25, 2.0], [-0.125, 0.5]])
    arguments = {"calibration": calibration, "axis": axis, "symmetric": False, "percentile": 100}
    quantizer = fcg.FakeQuant(8, dynamic=False, **arguments)
    quantizer.observe(jnp.full((3, 2), bad))
    quantizer.observe(x.at[0, 1].set(bad))
    found = quantizer.low[...].ravel(), quantizer.high[...].ravel()
    np.testing.assert_array_equal(found[0], [-0.125] if axis is None else [-0.125, 0])
    np.testing.assert_array_equal(found[1], [2] if axis is None else [0.5, 2])
    quantizer.observe(jnp.full((3, 2), bad))
    np.testing.assert_array_equal(quantizer.high[...].ravel(), found[1])


@pytest.mark.parametrize(("n", "block"), [(7, 3)])
def test_blocks_have_ranges_of_their_own(n, block):
    x = jax.random.normal(jax.random.key(0), (2, n, 3))

    @jax.jit
    def program(x):
        one = fcg.FakeQuant(4, axis=(0, 2))
        apart = [one(x[:, i : i + block]) for i in range(0, n, block)]
        return fcg.FakeQuant(4, axis=1, block=block)(x), jnp.concatenate(apart, 1)

    np.testing.assert_array_equal(*program(x))


def test_a_percentile_leaves_outliers_outside():
    x = jnp.arange(101.0).at[100].set(1e6)
    quantizer = fcg.FakeQuant(8, calibration="percentile", percentile=99)

    @jax.jit
    def program(x):
        return quantizer(x), jax.grad(lambda x: quantizer(x).sum())(x)

    y, dx = program(x)
    np.testing.assert_array_equal(dx, np.arange(101) < 100)
    np.testing.assert_allclose(y[-1], 99, rtol=1e-5)


def test_recorded_ranges_take_further_arrays_in():
    widest = _recorded([1.0, -2.0], bits=8)
    widest.observe(jnp.array([NAN, 0.5]))
    widest.observe(jnp.array([-3.0]))
    assert (widest.low[...], widest.high[...]) == (-3, 3)
    moved = _recorded([1.0], bits=8, calibration="percentile", percentile=100.0, momentum=0.75)
    moved.observe(jnp.array([3.0]))
    assert moved.high[...] == 1.5
    assert fcg.FakeQuant(8).observe(jnp.ones(3)) is None


def test_a_moving_average_moves_in_training_under_jit_and_scan_and_rests_in_eval():
    quantizer = fcg.FakeQuant(8, calibration="moving_average", momentum=0.5)

    @nnx.jit
    def call(quantizer, x):
        return quantizer(x)

    fresh = nnx.clone(quantizer)
    fresh.eval()
    np.testing.assert_allclose(call(fresh, jnp.array([0.5, 1.0])), [0.5, 1.0], atol=0.01)
    assert fresh.high[...] == -jnp.inf

    call(quantizer, jnp.array([1.0, -2.0]))
    call(quantizer, jnp.array([4.0]))
    assert quantizer.high[...] == 3
    quantizer.eval()
    np.testing.assert_allclose(call(quantizer, jnp.array([9.0])), [3.0])
    assert quantizer.high[...] == 3
    quantizer.train()

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def steps(quantizer, x):
        return quantizer, quantizer(x)

    quantizer, _ = steps(quantizer, jnp.array([[1.0], [2.0]]))
    assert quantizer.high[...] == 2
    assert jnp.isfinite(call(quantizer, jnp.array([NAN, 1.0]))[1])
    assert quantizer.high[...] == 1.5
    assert not jnp.isfinite(call(quantizer, jnp.array([NAN, INF]))).any()
    assert quantizer.high[...] == 1.5


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes(dtype):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (4, 6), jnp.dtype(dtype))
        got = jax.jit(fcg.FakeQuant(5, axis=-1))(x)
        wide = np.asarray(x, np.result_type(np.float32, dtype))
        s = np.abs(wide).max(0) * wide.dtype.type(1 / 15)
        np.testing.assert_array_equal(got, (np.round(wide / s) * s).astype(dtype))
        assert got.dtype == x.dtype


def test_zeros_infinities_and_nothing():
    channels = jax.jit(fcg.FakeQuant(4, axis=-1))
    x = jnp.array([[0.0, INF, NAN, 7.0], [0.0, 1.0, 1.0, -3.0]])
    y = np.asarray(channels(x))
    np.testing.assert_array_equal(y[:, [0, 3]], np.asarray(x)[:, [0, 3]])
    assert not np.isfinite(y[:, 1:3]).any()
    recorded = jax.jit(_recorded([1.0], bits=4))
    np.testing.assert_array_equal(np.isfinite(recorded(x[0])), [True, False, False, True])
    assert channels(jnp.zeros((0, 3))).shape == (0, 3)
    assert jax.jit(fcg.FakeQuant(4))(jnp.zeros((3, 0))).shape == (3, 0)
    largest = jnp.array([3.4e38, -3.4e38])
    assert np.isfinite(jax.jit(fcg.FakeQuant(4, symmetric=False))(largest)).all()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: fcg.FakeQuant(1), r"FakeQuant: bits=1 must be an integer from 2 to 16"),
        (lambda: fcg.FakeQuant(8.0), r"FakeQuant: bits=8.0 must be an integer"),
        (lambda: fcg.FakeQuant(calibration="max"), r"calibration='max' must be \"absmax\""),
        (lambda: fcg.FakeQuant(percentile=0.99), r"percentile=0.99 must be from 50 to 100"),
        (lambda: fcg.FakeQuant(momentum=1), r"momentum=1 must be in \[0, 1\)"),
        (lambda: fcg.FakeQuant(block=0, axis=0), r"block=0 must be an integer of at least 1"),
        (lambda: fcg.FakeQuant(block=2), r"block=2 needs the one axis along which blocks lie"),
        (
            lambda: fcg.FakeQuant(calibration="moving_average", dynamic=True),
            r"a moving average is of several arrays",
        ),
        (lambda: fcg.FakeQuant(rounding="up"), r"rounding='up' must be \"nearest\""),
        (
            lambda: fcg.FakeQuant(rounding="stochastic"),
            r'FakeQuant: rounding="stochastic" draws noise: write rngs=nnx.Rngs\(0\)',
        ),
        (lambda: fcg.FakeQuant(dynamic=False)(jnp.ones(2)), r"no range has been recorded"),
        (lambda: fcg.FakeQuant(axis=1)(jnp.ones(2)), r"axis=\(1,\) does not exist in an array"),
    ],
)
def test_errors(make, error):
    with pytest.raises(ValueError, match=error):
        make()


# Stochastic rounding.


def _stochastic(*args, **kwargs):
    return fcg.FakeQuant(*args, rounding="stochastic", rngs=nnx.Rngs(0), **kwargs)


@nnx.jit
def _draw(quantizer, x):
    return quantizer.quantize(x)[:2]


@pytest.mark.parametrize(
    ("dtype", "kwargs"),
    [
        ("float32", {"axis": -1}),
        ("float32", {"axis": 1, "block": 2}),
        ("bfloat16", {"symmetric": False}),
        ("float16", {"symmetric": False, "dynamic": False}),
    ],
)
def test_stochastic_rounding_is_right_on_average_and_drawn_anew(dtype, kwargs):
    one = jnp.array([[0.3, -0.5], [0.7, 0.111], [0.0, 0.9], [0.98, 1.0]], dtype)
    x = jnp.broadcast_to(one, (4000, 4, 2))
    quantizer = _stochastic(4, **kwargs)
    quantizer.observe(x)
    y, codes = map(np.asarray, _draw(quantizer, x))
    assert y.dtype == x.dtype
    spread = np.ptp(codes.astype(int), 0)
    assert spread.max() == 1
    # Half precision rounds the values themselves; 0.005 is 4.4 times the error of a mean.
    mean, expected = y.astype(float).mean(0), np.asarray(one, float)
    np.testing.assert_allclose(mean, expected, atol=0.005, rtol=2**-9)
    assert (spread[2, 0], spread[3, 1]) == (0, 0)  # Zero and the end of the range.
    assert (np.asarray(_draw(quantizer, x)[1]) != codes).any()
    quantizer.eval()
    nearest = fcg.FakeQuant(4, **kwargs)
    nearest.observe(x)
    np.testing.assert_array_equal(_draw(quantizer, x)[0], _draw(nearest, x)[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_on_the_grid_stays_there(symmetric):
    quantizer = _stochastic(8, dynamic=False, symmetric=symmetric)
    quantizer.observe(jnp.array([-0.3 * 127, 0.07]))
    grid = np.unique(_draw(quantizer, np.linspace(-40, 40, 4000, dtype=np.float32))[0])
    grid = np.concatenate([_draw(quantizer, np.float32([-99.0, 99.0]))[0], grid])
    x = np.broadcast_to(grid, (2000, *grid.shape))
    assert (np.asarray(_draw(quantizer, x)[0]) == x).all()


def test_the_noise_changes_no_gradient_and_nothing_is_kept_of_it():
    recorded = _stochastic(2, dynamic=False)
    recorded.observe(jnp.array([1.0]))
    # Within half a step of the bounds, on both sides.
    x = jnp.repeat(jnp.array([-1.4, -0.9, 0.6, 0.99, 1.01, 1.4]), 50)

    @jax.jit
    def program(x):
        y, pull = jax.vjp(lambda x: nnx.clone(recorded)(x), x)
        return y, pull(jnp.ones_like(y))[0]

    y, dx = program(x)
    assert set(np.unique(y[100:150]).tolist()) == {0, 1}
    np.testing.assert_array_equal(dx, np.abs(x) <= 1)
    nearest = _recorded([1.0], bits=2)
    kept = fcg.residual_bytes(lambda x: nnx.clone(recorded)(x), x)
    assert kept == fcg.residual_bytes(nearest, x)


def test_stochastic_rounding_at_the_limits():
    x = jnp.array([3.4e38, -3.3e38, 1e38])
    for symmetric in (True, False):
        assert np.isfinite(_draw(_stochastic(2, symmetric=symmetric), x)[0]).all()
    recorded = _stochastic(4, dynamic=False)
    recorded.observe(jnp.array([1.0]))
    got, _ = _draw(recorded, jnp.array([INF, -INF, NAN, 5.0]))
    np.testing.assert_array_equal(got, [INF, -INF, NAN, recorded.high[...]])
    assert (np.asarray(_draw(_stochastic(4), jnp.zeros(9))[0]) == 0).all()
    assert _draw(_stochastic(4, axis=-1), jnp.zeros((0, 3)))[0].shape == (0, 3)


def test_a_layer_rounds_stochastically_in_training_and_is_packed_to_the_nearest():
    layer = fcg.QuantLinear(
        6, 5, weight=_stochastic(3, axis=-1), activation=_stochastic(4), rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (7, 6))
    step = nnx.jit(nnx.value_and_grad(lambda layer, x: (layer(x) ** 2).sum()))
    (loss, grads), (again, _) = step(layer, x), step(layer, x)
    assert loss != again
    assert jnp.isfinite(grads.kernel[...]).all()
    packed = fcg.pack(layer)
    layer.eval()
    np.testing.assert_array_equal(packed(x), layer(x))
    nearest = fcg.QuantLinear(
        6, 5, weight=fcg.FakeQuant(3, axis=-1), activation=fcg.FakeQuant(4), rngs=nnx.Rngs(0)
    )
    np.testing.assert_array_equal(layer(x), nearest(x))
