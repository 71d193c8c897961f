"""Surrogates: the step to the bit, the gradient as its formula has it, in every dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_customgrad as fcg
from flax_customgrad import surrogate

POSITIVE = np.array([0.0, 1e-6, 0.04, 0.25, 0.5, 1.0, 1.5, 1e3, 1e30, np.inf])
POINTS = np.concatenate([-POSITIVE, POSITIVE])


def bell(v):
    return 1 / (4 * np.cosh(np.minimum(v, 300) / 2) ** 2)


# (u, slope) -> factor; the slope by default; what the factor integrates to.
SURROGATES = {
    "fast_sigmoid": (lambda u, k: 1 / (1 + k * np.abs(u)) ** 2, 25.0, lambda k: 2 / k),
    "atan": (lambda u, k: (k / 2) / (1 + (np.pi * k * u / 2) ** 2), 2.0, lambda k: 1),
    "sigmoid": (lambda u, k: k * bell(k * np.abs(u)), 4.0, lambda k: 1),
    "triangular": (lambda u, k: np.maximum(0, 1 - k * np.abs(u)), 1.0, lambda k: 1 / k),
    "boxcar": (lambda u, k: (k * np.abs(u) <= 1) * 1.0, 1.0, lambda k: 2 / k),
    "piecewise_exponential": (lambda u, k: np.exp(-k * np.abs(u)), 1.0, lambda k: 2 / k),
}
every_surrogate = pytest.mark.parametrize("name", SURROGATES)


def cotangent(function, u, g=1.0):
    return jax.vjp(function, u)[1](jnp.full_like(u, g))[0]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_value_and_gradient(dtype):
    slopes = {name: (default, 5.0) for name, (_, default, _) in SURROGATES.items()}

    @jax.jit
    def program(u, g):
        def results(name, slope, normalize):
            function = getattr(surrogate, name)
            if slope != SURROGATES[name][1]:
                function = functools.partial(function, slope=slope)
            function = functools.partial(function, normalize=normalize)
            return function(u), cotangent(function, u, g)

        return {
            name: [[results(name, slope, normalize) for normalize in (False, True)] for slope in ks]
            for name, ks in slopes.items()
        }

    with jax.enable_x64(dtype == "float64"), np.errstate(over="ignore"):
        u = jnp.asarray(POINTS, dtype)
        g = np.arange(1.0, u.size + 1)
        found = program(u, jnp.asarray(g, dtype))
    wide = np.asarray(u, np.float64)
    tolerance = {"float64": 1e-12, "float32": 2e-6, "float16": 1e-3}.get(dtype, 1e-2)
    for name, (factor, _, integral) in SURROGATES.items():
        for slope, pair in zip(slopes[name], found[name], strict=True):
            with np.errstate(over="ignore"):
                expected = g * factor(wide, slope)
            for (y, du), scale in zip(pair, (1, 1 / integral(slope)), strict=True):
                assert y.dtype == du.dtype == u.dtype
                np.testing.assert_array_equal(np.asarray(y, np.float64), wide > 0, err_msg=name)
                np.testing.assert_allclose(
                    np.asarray(du, np.float64),
                    scale * expected,
                    rtol=tolerance,
                    atol=tolerance * 1e-3,
                    err_msg=f"{name}, {slope}",
                )


@every_surrogate
def test_no_number_stays_none(name):
    assert np.isnan(getattr(surrogate, name)(jnp.nan))
    assert getattr(surrogate, name)(jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_far_from_the_threshold_nothing_is_left_of_the_gradient(dtype):
    slopes = np.array([0.5, 1e4, 1e38])

    @jax.jit
    def program(u):
        def far(name, slope):
            return cotangent(functools.partial(getattr(surrogate, name), slope=slope), u)

        return {name: [far(name, slope) for slope in slopes.tolist()] for name in SURROGATES}

    for name, found in program(jnp.array([-6e4, -1e3, 1e3, 6e4, jnp.inf, -jnp.inf], dtype)).items():
        bound = 1e-3 * np.maximum(1, slopes / 1e4)
        assert (np.abs(np.asarray(found, np.float32)) < bound[:, None]).all(), name


def test_normalized_it_integrates_to_one():
    # With u = tan(t), which reaches to infinity.
    @jax.jit
    def densities(u):
        def density(name, slope):
            function = functools.partial(getattr(surrogate, name), slope=slope, normalize=True)
            return cotangent(function, u)

        return {(name, k): density(name, k) for name in SURROGATES for k in (1.0, 2.5)}

    with jax.enable_x64(True):
        t = (np.arange(200_000) + 0.5) * (np.pi / 200_000) - np.pi / 2
        for case, density in densities(jnp.tan(t)).items():
            assert (density >= 0).all(), case
            mean = (density / np.cos(t) ** 2).mean()
            assert mean * np.pi == pytest.approx(1, abs=1e-5), case


def test_both_sides_of_the_threshold_are_positive():
    @jax.jit
    def program(u):
        return {name: cotangent(getattr(surrogate, name), u) for name in SURROGATES}

    for name, du in program(jnp.array([-0.3, 0.3])).items():
        assert du[0] == du[1] > 0, name


def test_the_bounds_of_the_boxcar_are_inside_it():
    u = jnp.array([-0.26, -0.25, 0.25, 0.26])
    for dtype in (jnp.float32, jnp.bfloat16):
        got = cotangent(functools.partial(surrogate.boxcar, slope=4), u.astype(dtype))
        np.testing.assert_array_equal(got, [0, 1, 1, 0])
    assert fcg.residual_bytes(surrogate.boxcar, jnp.ones(1000)) == 1000


def test_a_slope_for_each_neuron_has_no_gradient():
    u, slope = jnp.full((2, 3), 0.5), jnp.array([1.0, 2.0, 4.0])
    du, dslope = jax.grad(lambda u, k: surrogate.fast_sigmoid(u, k).sum(), (0, 1))(u, slope)
    np.testing.assert_allclose(du, [[4 / 9, 1 / 4, 1 / 9]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(dslope, 0)


def test_a_slope_may_be_traced():
    @jax.jit
    def annealed(slopes):
        def step(total, slope):
            return total + jax.grad(lambda u: surrogate.atan(u, slope))(0.0), None

        return jax.lax.scan(step, 0.0, slopes)[0]

    assert annealed(jnp.array([2.0, 4.0, 8.0])) == 7
    by_vmap = jax.vmap(lambda k: jax.grad(lambda u: surrogate.sigmoid(u, k))(0.0))
    np.testing.assert_allclose(by_vmap(jnp.array([4.0, 8.0])), [1, 2])


@every_surrogate
def test_bad_arguments(name):
    function = getattr(surrogate, name)
    for slope in (0.0, -1.0, float("nan"), float("inf"), np.array([1.0, 0.0])):
        with pytest.raises(ValueError, match=rf"{name}: slope=.* must be positive and finite"):
            function(jnp.ones(2), slope)
    with pytest.raises(ValueError, match=rf"{name}: a parameter of shape \(2, 1\) does not broad"):
        function(jnp.ones(3), jnp.ones((2, 1)))
    with pytest.raises(TypeError, match=f"{name} takes float16, bfloat16, float32 and float64"):
        function(jnp.ones(3, jnp.complex64))
