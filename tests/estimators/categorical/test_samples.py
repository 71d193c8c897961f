"""Categorical estimators: what a sample is, and its surrogate gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_customgrad as fcg
from flax_customgrad.estimators.categorical.reinmax import one_hot_sample

KEY = jax.random.key(0)
LOGITS = jnp.array([[0.3, -1.2, 2.0, 0.1], [1.5, 1.4, -0.6, -3.0], [0.0, 0.0, 0.0, 0.0]])
HALVES = (jnp.bfloat16, jnp.float16)

soft = functools.partial(fcg.gumbel_softmax, hard=False)


def top_2(logits, key, temperature=1.0, *, axis=-1):
    return fcg.top_k_st(logits, 2, temperature, key=key, axis=axis)


# By name: the function of logits, key and temperature, and how many ones are in a row.
HARD = {"gumbel_softmax": (fcg.gumbel_softmax, 1), "reinmax": (fcg.reinmax, 1), "top_k": (top_2, 2)}
ALL = {**HARD, "soft": (soft, 1)}
by_name = pytest.mark.parametrize("name", ALL)
hard_by_name = pytest.mark.parametrize("name", HARD)


@functools.partial(jax.jit, static_argnums=0)
def results(name, logits, temperature, g):
    """The value, and the gradients of the logits and of the temperature."""
    y, pull = jax.vjp(lambda *args: ALL[name][0](args[0], KEY, args[1]), logits, temperature)
    return y, *pull(g)


def noise(shape):
    return jax.random.gumbel(KEY, shape, jnp.float32)


def jacobian(p):
    """Of a softmax that is p, for one row."""
    return np.diag(p) - np.outer(p, p)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@hard_by_name
@pytest.mark.parametrize("dtype", [jnp.float32, *HALVES])
def test_a_hard_sample_is_zeros_and_ones(name, dtype):
    function, k = HARD[name]
    logits = np.random.default_rng(0).standard_normal((500, 7)).astype(dtype)
    compiled = jax.jit(function)
    for temperature in (0.001, 1.0, 10.0):
        y = compiled(logits, KEY, temperature)
        assert y.dtype == dtype
        assert set(np.unique(np.asarray(y, np.float32))) == {0.0, 1.0}
        np.testing.assert_array_equal(np.asarray(y, np.float32).sum(-1), k)


@pytest.mark.parametrize("name", ["gumbel_softmax", "reinmax"])
def test_samples_have_the_probabilities_of_the_softmax(name):
    n = 40_000
    logits = jnp.log(jnp.array([0.05, 0.15, 0.8]))
    share = HARD[name][0](jnp.tile(logits, (n, 1)), KEY, 3.0).mean(0)
    np.testing.assert_allclose(share, [0.05, 0.15, 0.8], atol=4 * 0.5 / n**0.5)


def test_k_samples_are_without_replacement():
    """The chance that a class is among the first two drawn."""
    n, p = 40_000, np.array([0.1, 0.2, 0.7])
    share = top_2(jnp.tile(jnp.log(p), (n, 1)), KEY).mean(0)
    pairs = [[0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(share, p + np.sum(pairs, 0), atol=4 * 0.5 / n**0.5)


def test_the_k_largest():
    z = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    cases = [(k, axis) for k in (1, 2, 4) for axis in (-1, 0, 1)]
    found = jax.jit(lambda z: [fcg.top_k_st(z, k, axis=axis) for k, axis in cases])(z)
    for y, (k, axis) in zip(found, cases, strict=True):
        rank = np.argsort(np.argsort(-z, axis), axis)
        np.testing.assert_array_equal(y, rank < k)


@pytest.mark.smoke
@pytest.mark.parametrize("jit", [False, True])
def test_ties_go_to_the_lowest_index(jit):
    x = np.float32([[1, 2, 2, 2], [0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -0.0, 0.0], [3, 1, 1, 1]])

    def chosen(x):
        k_largest = [fcg.top_k_st(x, k) for k in (1, 2, 4)]
        return k_largest, [fcg.gumbel_softmax(x, None), fcg.reinmax(x, None)]

    (one, two, four), others = (jax.jit(chosen) if jit else chosen)(x)
    np.testing.assert_array_equal(one, [[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(two, [[0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(four, np.ones((4, 4)))
    for y in others:
        np.testing.assert_array_equal(y, one)


@pytest.mark.parametrize("name", ["gumbel_softmax", "soft", "top_k"])
def test_the_gradient_is_that_of_the_softmax_at_the_temperature(name):
    g = np.asarray(jax.random.normal(KEY, LOGITS.shape), np.float64)
    logits = np.asarray(LOGITS, np.float64)
    z = logits + np.asarray(noise(logits.shape), np.float64)
    for t in (0.5, 2.0):
        with jax.enable_x64(True):
            _, dlogits, dtemperature = results(name, jnp.array(logits), jnp.array(t), jnp.array(g))
        ds = np.stack([jacobian(p) @ row for p, row in zip(softmax(z / t), g, strict=True)])
        np.testing.assert_allclose(dlogits, ds / t, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(dtemperature, -np.sum(ds * z) / t**2, rtol=1e-12)


def test_the_gradient_of_reinmax_is_that_of_its_paper():
    """The second algorithm of the paper, whose gradient autodiff takes."""

    @jax.jit
    def both(logits, temperature, g):
        d, dlogits, _ = results("reinmax", logits, temperature, g)

        def algorithm(logits):
            p0 = jax.nn.softmax(logits)
            p1 = (d + jax.nn.softmax(logits / temperature)) / 2
            p1 = jax.nn.softmax(jax.lax.stop_gradient(jnp.log(p1) - logits) + logits)
            return 2 * p1 - p0 / 2

        return dlogits, jax.vjp(algorithm, logits)[1](g)[0]

    with jax.enable_x64(True):
        g = jax.random.normal(KEY, LOGITS.shape, jnp.float64)
        for temperature in (1.0, 1.7):
            dlogits, expected = both(LOGITS.astype(jnp.float64), temperature, g)
            np.testing.assert_allclose(dlogits, expected, rtol=1e-12, atol=1e-14)


def test_the_temperature_of_reinmax_is_no_part_of_its_forward():
    y, _, dtemperature = results("reinmax", LOGITS, jnp.array(2.0), LOGITS)
    np.testing.assert_array_equal(y, fcg.reinmax(LOGITS, KEY))
    assert dtemperature == 0


def test_reinmax_is_exact_for_a_quadratic_loss():
    """The mean over all samples, as the straight-through estimator's is not: y A y."""
    with jax.enable_x64(True):
        logits = jnp.array([0.3, -0.7, 1.1])
        a = jnp.array([[1.0, 0.4, -0.3], [0.4, -2.0, 0.8], [-0.3, 0.8, 0.5]])

        @jax.jit
        @jax.vmap
        def estimate(d):
            _, pull = jax.vjp(lambda x: one_hot_sample(x, 1.0, 99 * d, -1), logits)
            return pull(2 * a @ d)[0]

        p = softmax(np.asarray(logits))
        exact = jacobian(p) @ np.diag(a)
        np.testing.assert_allclose(p @ estimate(jnp.eye(3)), exact, rtol=1e-12)
        straight_through = jacobian(p) @ (2 * a @ p)
        assert np.abs(straight_through - exact).max() > 0.05


@by_name
@pytest.mark.parametrize("dtype", [jnp.float32, *HALVES])
def test_extreme_logits_have_finite_gradients(name, dtype):
    # 1e37 divided by 1e-3 would be infinite.
    for scale in (1e3, 1e4, *(() if dtype == jnp.float16 else (1e37,))):
        logits = jnp.array([[scale, -scale, 0.5 * scale], [0.0, 0.0, 0.0]], dtype)
        g = jnp.array([[0.25, 1.0, -0.5], [0.75, 0.125, 0.5]], dtype)
        for temperature in (1e-3, 1.0, 1e3):
            y, dlogits, dtemperature = results(name, logits, jnp.array(temperature), g)
            np.testing.assert_allclose(np.float32(y).sum(-1), ALL[name][1], rtol=1e-2)
            assert np.isfinite(np.float32(dlogits)).all()
            assert np.isfinite(dtemperature)


def test_saturated_weights_keep_the_digits_of_their_gradient():
    """A weight that is 1 to all digits has a gradient: minus that of the others."""
    logits, g = np.float32([0.0, -3.0, -4.0]), np.float32([1.3, -0.7, 0.4])
    pulled = jax.jit(lambda t: jax.vjp(lambda x: soft(x, None, t), logits)[1](g)[0])
    for temperature in (0.1, 0.05):
        dlogits = pulled(temperature)
        p = softmax(np.asarray(logits, np.float64) / temperature)
        others = (p * (np.asarray(g, np.float64) - p @ g) / temperature)[1:]
        np.testing.assert_allclose(dlogits, [-others.sum(), *others], rtol=1e-5)


@by_name
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_rounded_once(name, dtype):
    logits, g = np.random.default_rng(1).standard_normal((2, 50, 6)).astype(dtype)
    y, dlogits, _ = results(name, logits, np.float32(0.7), g)
    wide, expected, _ = results(name, np.float32(logits), np.float32(0.7), np.float32(g))
    assert y.dtype == dlogits.dtype == dtype
    limits = jnp.finfo(dtype)
    half, tiny = float(limits.eps) / 2, float(limits.tiny)
    np.testing.assert_allclose(np.float32(y), wide, rtol=half, atol=tiny)
    # The softmax that is kept is rounded, but for ReinMax.
    atol = tiny if name == "reinmax" else 3 * half * np.abs(expected).max()
    np.testing.assert_allclose(np.float32(dlogits), expected, rtol=half, atol=atol)


@by_name
def test_masked_classes_have_no_probability_and_no_gradient(name):
    logits, g = LOGITS.at[:, 2].set(-jnp.inf), jax.random.normal(KEY, LOGITS.shape)
    y, dlogits, dtemperature = results(name, logits, jnp.array(0.5), g)
    np.testing.assert_allclose(y.sum(-1), ALL[name][1], rtol=1e-6)
    np.testing.assert_array_equal(y[:, 2], 0)
    np.testing.assert_array_equal(dlogits[:, 2], 0)
    np.testing.assert_allclose(dlogits.sum(-1), 0, atol=1e-6)
    assert np.isfinite(dtemperature)
    without, *_ = results(name, LOGITS.at[:, 2].set(-1e9), jnp.array(0.5), g)
    np.testing.assert_array_equal(y, without)


ROWS = {
    "NaN": [jnp.nan, 1.0, 2.0],
    "infinity": [jnp.inf, 1.0, 2.0],
    "masked": [-jnp.inf, -jnp.inf, -jnp.inf],
}


@by_name
def test_a_row_without_a_choice(name):
    rows = [[jnp.nan, 1, 2], [jnp.inf, 1, 2], [-jnp.inf] * 3, [0, 1, 2]]
    logits = jnp.array(rows)
    for row in logits[:3]:
        with pytest.raises(
            ValueError, match=r"a row of the logits holds NaN or infinity, or fewer"
        ):
            ALL[name][0](row, KEY)
    y, dlogits, _ = results(name, logits, jnp.array(1.0), jnp.ones_like(logits))
    for found in (y, dlogits):
        assert np.isnan(found[:3]).all()
        assert np.isfinite(found[3]).all()


@by_name
def test_the_second_derivative_by_the_temperature_beside_a_masked_class(name):
    """As that of a class so unlikely that its weight is 0."""

    @jax.jit
    def second(logits):
        def loss(x, t):
            return jnp.sum(jnp.sin(jnp.arange(4) + ALL[name][0](x, KEY, t)))

        def of_gradients(t):
            return sum(jnp.sum(jnp.cos(d)) for d in jax.grad(loss, (0, 1))(logits, t))

        return jax.grad(of_gradients)(0.7)

    masked, unlikely = (second(LOGITS.at[:, 2].set(low)) for low in (-jnp.inf, -1e4))
    np.testing.assert_allclose(masked, unlikely, rtol=1e-5)
    assert masked != 0


def test_too_few_classes_that_are_not_masked():
    logits = jnp.array([0.0, -jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(fcg.top_k_st(logits, 1), [1, 0, 0])
    with pytest.raises(ValueError, match=r"top_k_st: a row of the logits .* fewer than 2 numbers"):
        fcg.top_k_st(logits, 2)
    assert np.isnan(jax.jit(lambda x: fcg.top_k_st(x, 2))(logits)).all()


@by_name
def test_one_class_and_empty_batches(name):
    empty = jnp.zeros((0, 4))
    y, dlogits, dtemperature = results(name, empty, jnp.array(1.0), empty)
    assert y.shape == dlogits.shape == (0, 4)
    assert dtemperature == 0
    assert ALL[name][0](empty, KEY).shape == (0, 4)
    if ALL[name][1] == 1:
        one = jnp.array([[3.0], [-1e4]])
        y, dlogits, _ = results(name, one, jnp.array(1.0), 7 * one)
        np.testing.assert_array_equal(y, 1)
        np.testing.assert_array_equal(dlogits, 0)


@by_name
def test_the_same_key_gives_the_same_sample_in_every_dtype(name):
    function, _ = ALL[name]
    logits = LOGITS.astype(jnp.bfloat16)
    y = function(logits, KEY)
    for dtype in (jnp.float16, jnp.float32):
        other = function(logits.astype(dtype), KEY)
        np.testing.assert_allclose(np.float32(y), np.float32(other), rtol=2**-8)
    old = jax.random.PRNGKey(0)
    np.testing.assert_array_equal(function(LOGITS, old), function(LOGITS, KEY))


@by_name
def test_a_scheduled_temperature_in_scan_and_vmap(name):
    keys, temperatures = jax.random.split(KEY, 3), jnp.array([0.5, 1.0, 2.0])

    @jax.jit
    def gradient(key, t):
        return jax.grad(lambda x: jnp.sum(jnp.sin(LOGITS) * ALL[name][0](x, key, t)))(LOGITS)

    expected = [gradient(k, t) for k, t in zip(keys, temperatures, strict=True)]
    _, scanned = jax.lax.scan(lambda _, kt: (None, gradient(*kt)), None, (keys, temperatures))
    mapped = jax.vmap(gradient)(keys, temperatures)
    for found in (scanned, mapped):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_the_soft_sample_is_exact_also_to_second_order():
    def plain(x, t):
        return jax.nn.softmax((x + noise(x.shape)) / t)

    with jax.enable_x64(True):
        args = jnp.array(np.asarray(LOGITS), jnp.float64), jnp.array(0.7)

        def second(f):
            loss = lambda x, t: jnp.sum(jnp.sin(3 * f(x, t)))  # noqa: E731
            inner = jax.grad(loss, (0, 1))
            return jax.grad(lambda *a: jnp.sum(jnp.cos(inner(*a)[0])) + inner(*a)[1] ** 2, (0, 1))

        ours = jax.jit(second(lambda x, t: soft(x, KEY, t)))(*args)
        for a, b in zip(ours, jax.jit(second(plain))(*args), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    with fcg.use_autodiff():
        tangent = jax.jvp(lambda x: soft(x, KEY, 0.7), (LOGITS,), (jnp.ones_like(LOGITS),))[1]
    np.testing.assert_allclose(tangent, 0, atol=1e-6)


@by_name
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept(name, dtype):
    """The softmax; of ReinMax the index of each row's sample, beside the logits."""
    logits = LOGITS.astype(dtype)
    kept = fcg.residuals(lambda x, t: ALL[name][0](x, KEY, t), logits, jnp.array(0.5))
    ours = [(r.shape, r.dtype) for r in kept if not r.is_argument]
    index, p = ((3, 1), jnp.int32), ((3, 4), dtype)
    assert ours == [index if name == "reinmax" else p]


BAD = {
    "temperature=0": (lambda f: f(LOGITS, KEY, 0), r"temperature=0 must be positive and finite"),
    "temperature=nan": (lambda f: f(LOGITS, KEY, float("nan")), r"temperature=nan must be"),
    "temperature=[-1]": (lambda f: f(LOGITS, KEY, jnp.array(-1.0)), r"temperature=Array\(-1"),
    "temperature a class": (
        lambda f: f(LOGITS, KEY, jnp.ones(4)),
        r"temperature has shape \(4,\); expected .* broadcasts to \(3, 1\)",
    ),
    "axis": (
        lambda f: f(LOGITS, KEY, axis=2),
        r"axis=2 is not an axis of logits",
    ),
    "a number": (lambda f: f(jnp.array(1.0), KEY), r"axis=-1 is not an axis of logits of shape"),
    "no class": (lambda f: f(jnp.zeros((3, 0)), KEY), r"of the 0 classes on axis -1"),
}


@by_name
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(name, bad):
    call, message = BAD[bad]
    function, _ = ALL[name]
    public = {"top_k": "top_k_st", "soft": "gumbel_softmax"}.get(name, name)
    with pytest.raises(ValueError, match=f"{public}: .*{message}"):
        call(function)


def test_bad_k_and_dtypes():
    for k in (0, 5, -1, 1.0, True):
        with pytest.raises(ValueError, match=rf"top_k_st: k={k!r} of the 4 classes on axis -1"):
            fcg.top_k_st(LOGITS, k)
    with pytest.raises(TypeError, match="gumbel_softmax: logits are int32; expected a floating"):
        fcg.gumbel_softmax(jnp.arange(3), KEY)
