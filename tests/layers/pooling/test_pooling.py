"""The poolings take the place of nnx's: signatures, values, gradients, dtypes, edges, errors."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import export, lax

import flax_customgrad as fcg
from flax_customgrad.layers.pooling import avg_pool, max_pool

POOLS = ["max_pool", "min_pool", "avg_pool"]
SETTINGS = settings(max_examples=8, deadline=None, derandomize=True)


def image(*shape, dtype=jnp.float32, ties=False):
    values = np.random.default_rng(sum(shape)).standard_normal(shape)
    return jnp.asarray(np.round(values) if ties else values, dtype)


def weights(shape, dtype):
    return jnp.asarray(np.cos(np.arange(np.prod(shape))).reshape(shape), dtype)


def pulled(f, x):
    """The value of f, and the gradient of a sum with weights that are all different."""
    y, pull = jax.vjp(f, x)
    return y, pull(weights(y.shape, y.dtype))[0]


def agree(*cases, tolerance):
    """Ours and nnx's have the same value and gradient; all cases in one program.

    A case is a function that makes a function of images from a module, and its images.
    """

    @jax.jit
    def outcomes(images):
        return [
            [pulled(f(m), x) for m in (fcg, nnx)] for (f, _), x in zip(cases, images, strict=True)
        ]

    results = outcomes([x for _, x in cases])
    for ours, theirs in results:
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    return results


def pooled(name, *arguments, **kwargs):
    """What makes a function of images from a module."""
    return lambda module: lambda x: getattr(module, name)(x, *arguments, **kwargs)


@pytest.mark.smoke
@pytest.mark.parametrize("name", [*POOLS, "pool"])
def test_signatures_are_those_of_nnx(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (fcg, nnx))
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


@st.composite
def poolings(draw):
    """A pooling of any kind, and an image with ties for it."""
    n = draw(st.integers(1, 3))
    one = st.integers(1, 7 if n < 3 else 3)
    shape = tuple(draw(one) for _ in range(n))
    window = tuple(draw(st.integers(1, size + 2)) for size in shape)
    strides = draw(st.none() | st.tuples(*[st.integers(1, 4)] * n))
    pads = st.tuples(st.integers(0, 4), st.integers(0, 4))
    padding = draw(st.sampled_from(["SAME", "SAME_LOWER", "VALID"]) | st.tuples(*[pads] * n))
    # nnx takes pairs for a single batch axis only.
    batch = (2,) if not isinstance(padding, str) else draw(st.sampled_from([(), (2,), (2, 1)]))
    name = draw(st.sampled_from([*POOLS, "inside", "sum"]))
    return name, (*batch, *shape, draw(st.integers(1, 2))), (window, strides, padding)


@SETTINGS
@given(poolings())
@example(("max_pool", (2, 11, 2), ((9,), (2,), ((4, 9),))))
@example(("avg_pool", (1, 7, 7, 2), ((5, 4), (2, 3), "SAME")))
@example(("avg_pool", (1, 3, 2), ((1,), (4,), "VALID")))
def test_random_poolings_in_float64(case):
    name, shape, arguments = case

    def pool(module):
        if name == "sum":
            return lambda x: module.pool(x, 0.0, lax.add, *arguments)
        if name == "inside":
            return lambda x: module.avg_pool(x, *arguments, count_include_pad=False)
        return lambda x: getattr(module, name)(x, *arguments)

    with jax.enable_x64(True):
        agree((pool, image(*shape, dtype=jnp.float64, ties=True)), tolerance=1e-12)


CASES = {
    "2x2": ((2, 2), (2, 2), "VALID"),
    "3x3 stride 2": ((3, 3), (2, 2), "SAME"),
    "5x4": ((5, 4), None, "SAME"),
    "whole": ((6, 5), None, "VALID"),
}
cases = pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
names = pytest.mark.parametrize("name", POOLS)


@names
def test_float32(name):
    x = image(2, 6, 5, 3)
    results = agree(*((pooled(name, *a), x) for a in CASES.values()), tolerance=1e-6)
    if name != "avg_pool":
        for (ours, _), (theirs, _) in results:
            np.testing.assert_array_equal(ours, theirs)


@names
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_dtypes_are_those_of_nnx(name, x64):
    with jax.enable_x64(x64):
        for dtype in (*"efilD?", jnp.bfloat16, *("dF" if x64 else "F")):
            x = jax.ShapeDtypeStruct((2, 4, 4, 1), dtype)
            counts = [{}] if name != "avg_pool" else [{}, {"count_include_pad": False}]
            for count in counts:

                def outcome(module, x=x, count=count):
                    pool = functools.partial(getattr(module, name), **count)
                    try:
                        return jax.eval_shape(lambda x: pool(x, (2, 2), (2, 2)), x).dtype
                    except Exception as error:
                        return type(error)

                assert outcome(fcg) == outcome(nnx), (dtype, count)


@names
def test_half_precision_is_rounded_once(name):
    window = {"window_shape": (5, 5), "padding": "SAME"}

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def outcome(module, x, g, dtype):
        pool = functools.partial(getattr(module, name), **window)
        y, pull = jax.vjp(pool, x.astype(dtype))
        return y, pull(g.astype(dtype))[0]

    for dtype in (jnp.bfloat16, jnp.float16):
        x = image(2, 8, 8, 3, dtype=dtype)
        g = weights(x.shape, dtype)
        with jax.enable_x64(True):
            exact = list(map(np.asarray, outcome(nnx, x, g, jnp.float64)))
        both = outcome(fcg, x, g, dtype), outcome(nnx, x, g, dtype)
        for ours, theirs, expected in zip(*both, exact, strict=True):
            scale = np.max(np.abs(expected))
            mine, other = (np.max(np.abs(np.asarray(a, float) - expected)) for a in (ours, theirs))
            assert mine / scale <= jnp.finfo(dtype).eps / 2
            assert mine <= other


# Ties, infinities and NaN.


@pytest.mark.parametrize("name", ["max_pool", "min_pool"])
def test_the_first_of_equals_gets_the_gradient(name):
    x = jnp.zeros((1, 4, 5, 1))
    fitting = [a for a in CASES.values() if all(k <= n for k, n in zip(a[0], (4, 5), strict=True))]
    agree(*((pooled(name, *a), x) for a in fitting), tolerance=1e-6)
    (dx,) = jax.vjp(lambda x: getattr(fcg, name)(x, (2, 2), (2, 2)), x)[1](jnp.ones((1, 2, 2, 1)))
    assert np.argwhere(np.asarray(dx)).tolist() == [[0, i, j, 0] for i in (0, 2) for j in (0, 2)]


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["max_pool", "min_pool"])
def test_windows_in_the_padding_alone_have_no_gradient(name):
    infinity = {"max_pool": -np.inf, "min_pool": np.inf}[name]
    pool = pooled(name, (2,), (1,), ((3, 2),))
    ((y, dx), _), *_ = agree((pool, image(1, 3, 1)), tolerance=1e-6)
    assert y[0, 0, 0] == infinity
    assert np.isfinite(dx).all()


@names
def test_infinite_images(name):
    x = image(1, 4, 4, 1)
    images = [x.at[0, 1:3].set(value) for value in (np.inf, -np.inf)]
    pools = [pooled(name, (3, 2), (1, 1), padding) for padding in ("VALID", "SAME")]
    agree(*itertools.product(pools, images), tolerance=1e-6)


def test_of_nan_the_value_is_nan_and_one_element_gets_the_gradient():
    x = image(1, 6, 6, 2).at[0, 1, 1].set(np.nan).at[0, 4, 4].set(np.nan)
    ours, theirs = (m.max_pool(x, (3, 3), (3, 3)) for m in (fcg, nnx))
    np.testing.assert_array_equal(ours, theirs)
    (dx,) = jax.vjp(lambda x: fcg.max_pool(x, (3, 3), (3, 3)), x)[1](jnp.ones_like(ours))
    tiles = np.asarray(dx).reshape(2, 3, 2, 3, 2).swapaxes(1, 2).reshape(4, 9, 2)
    np.testing.assert_array_equal(np.sort(tiles, axis=1)[:, -1], 1)
    np.testing.assert_array_equal(tiles.sum(axis=1), 1)


def test_an_average_of_padding_alone_is_that_of_nnx():
    pool = pooled("avg_pool", (2,), (1,), ((3, 3),), count_include_pad=False)
    x = image(1, 3, 1)
    np.testing.assert_array_equal(*(np.isnan(pool(m)(x)) for m in (fcg, nnx)))
    assert np.isfinite(pulled(pool(fcg), x)[1]).all()


# Shapes.


@names
def test_any_number_of_batch_axes(name):
    pool = pooled(name, (2, 3), (1, 2), ((1, 0), (2, 2)))

    @jax.jit
    def outcomes(images):
        return [(pool(fcg)(x), pool(nnx)(x.reshape(-1, *x.shape[-3:]))) for x in images]

    images = [image(*shape) for shape in ((5, 4, 2), (1, 5, 4, 2), (2, 3, 5, 4, 2))]
    for x, (y, expected) in zip(images, outcomes(images), strict=True):
        assert y.shape == (*x.shape[:-3], *expected.shape[1:])
        np.testing.assert_allclose(y, expected.reshape(y.shape), rtol=1e-6, atol=1e-6)


@names
def test_nothing_to_pool(name):
    shapes = (0, 5, 2), (2, 0, 2), (2, 5, 0), (2, 1, 2)
    agree(*((pooled(name, (2,), (2,)), image(*shape)) for shape in shapes), tolerance=0)


@names
def test_negative_padding_takes_elements_away(name):
    x, window = image(2, 6, 5, 2), ((2, 3), (1, 2))
    got = pulled(lambda x: getattr(fcg, name)(x, *window, ((-1, 1), (1, -2))), x)
    expected = pulled(lambda x: getattr(nnx, name)(x[:, 1:, :-2], *window, ((0, 1), (1, 0))), x)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
def test_windows_too_large_for_slices(name):
    agree((pooled(name, (40,), (3,), "SAME"), image(1, 50, 1)), tolerance=1e-6)


def test_other_reductions_are_those_of_nnx():
    x = image(2, 6, 3)
    for init, f in ((1.0, lax.mul), (0.0, lax.max), (2.0, lax.add), (0.0, lambda a, b: a + b)):
        ours, theirs = (m.pool(x, init, f, (2,), (2,), "VALID") for m in (fcg, nnx))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
@names
def test_other_dtypes_are_computed_as_nnx_does(name, dtype):
    x = jnp.asarray(3 * image(2, 5, 4, 2), dtype)
    for count in ({}, {"count_include_pad": False}) if name == "avg_pool" else ({},):
        try:
            expected = getattr(nnx, name)(x, (2, 3), (1, 2), "SAME", **count)
        except Exception as error:
            with pytest.raises(type(error)):
                getattr(fcg, name)(x, (2, 3), (1, 2), "SAME", **count)
        else:
            y = getattr(fcg, name)(x, (2, 3), (1, 2), "SAME", **count)
            assert y.dtype == expected.dtype
            np.testing.assert_array_equal(y, expected)


@names
def test_arguments_may_be_lists_and_arrays(name):
    x = np.asarray(image(2, 5, 4, 2))
    expected = getattr(nnx, name)(x, (2, 3), (1, 2), ((1, 0), (1, 1)))
    arguments = [2, np.int64(3)], np.array([1, 2]), [[1, 0], (1, 1)]
    for inputs in (x, nnx.Variable(jnp.asarray(x))):
        y = getattr(fcg, name)(inputs, *arguments)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "arguments", "error", "message"),
    [
        ((1, 4, 4, 1), (2,), TypeError, r"window_shape is 2: write .* \(2, 2\) for images"),
        ((1, 4, 4, 1), ((2.0, 2),), TypeError, r"window_shape is \(2.0, 2\): write whole numbers"),
        ((1, 4, 4, 1), ((0, 2),), ValueError, r"window_shape is \(0, 2\): .* at least 1"),
        ((1, 4, 4, 1), ((2, 2), 2), TypeError, "strides is 2: write whole numbers"),
        ((1, 4, 4, 1), ((2, 2), (1, 0)), ValueError, r"strides is \(1, 0\): .* at least 1"),
        ((1, 4, 4, 1), ((2, 2), (2,)), ValueError, r"differ in length: .* \(2, 2\) say"),
        ((4, 4), ((2, 2),), ValueError, r"\(4, 4\) have 2 axes, too few .* at least 3; write x"),
        ((1, 4, 4, 1), ((2, 2), None, "FULL"), ValueError, "'FULL' is none of SAME, SAME_LOWER"),
        (
            (1, 4, 4, 1),
            ((2, 2), None, 1),
            TypeError,
            r"padding is 1: .* \(\(1, 1\), \(1, 1\)\) say",
        ),
        ((1, 4, 4, 1), ((2, 2), None, (1, 1)), TypeError, r"padding is \(1, 1\): write SAME"),
        ((1, 4, 4, 1), ((2, 2), None, ((1, 1),)), ValueError, r"a pair \(before, after\) for each"),
    ],
)
def test_errors_say_what_to_write(shape, arguments, error, message):
    for pool in (fcg.max_pool, fcg.avg_pool):
        with pytest.raises(error, match=message):
            pool(jnp.ones(shape), *arguments)


# How it is computed.


def test_forward_mode():
    x = (image(1, 4, 4, 1),)
    ours = jax.jvp(functools.partial(fcg.max_pool, window_shape=(2, 2)), x, x)
    theirs = jax.jvp(functools.partial(nnx.max_pool, window_shape=(2, 2)), x, x)
    np.testing.assert_array_equal(ours, theirs)


def test_a_program_chooses_where_it_runs():
    def loss(x):
        y = fcg.max_pool(x, (3, 3), (2, 2), "SAME")
        return jnp.sum(fcg.avg_pool(y, (2, 2), count_include_pad=False))

    def exported(*platforms):
        x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
        return export.export(jax.jit(jax.grad(loss)), platforms=platforms)(x).mlir_module()

    for platform in ("cuda", "tpu"):
        assert "select_and_scatter" in exported(platform)
        assert "reduce_window" in exported(platform)
    assert "select_and_scatter" not in exported("cpu")
    assert "reduce_window" not in exported("cpu")


def test_off_the_cpu(monkeypatch):
    chosen = []

    def default(*args, cpu, default):
        chosen.append(default)
        return default(*args)

    jitted = (
        max_pool._extreme_value,
        max_pool._extreme_gradient,
        avg_pool._sum_value,
        avg_pool._sum_gradient,
    )
    for module in (max_pool, avg_pool):
        monkeypatch.setattr(module, "by_platform", default)
    try:
        for function in jitted:
            function.clear_cache()
        with jax.enable_x64(True):
            x = image(2, 6, 5, 3, dtype=jnp.float64)
            pools = []
            for padding in ("SAME", ((0, 4), (3, 0))):
                for count, *window in ((True, (3, 2), (2, 3)), (False, (4, 1), (1, 3))):
                    pools.append(pooled("avg_pool", *window, padding, count_include_pad=count))
                    pools.append(pooled("max_pool", *window, padding))
            agree(*((pool, x) for pool in pools), tolerance=1e-12)
        assert len(chosen) >= 2 * len(pools)  # value and gradient of each
    finally:
        for function in jitted:
            function.clear_cache()


def temporaries(f, x):
    """Memory of the value and gradient of a weighted sum, in sizes of x."""
    g = jax.eval_shape(f, x)
    compiled = jax.jit(jax.value_and_grad(lambda x, g: jnp.vdot(f(x), g))).lower(x, g).compile()
    return compiled.memory_analysis().temp_size_in_bytes / x.nbytes


@cases
def test_max_pool_keeps_x_and_avg_pool_nothing(arguments):
    x = image(4, 6, 5, 8)
    assert all(r.is_argument for r in fcg.residuals(lambda x: fcg.max_pool(x, *arguments), x))
    assert fcg.residuals(lambda x: fcg.avg_pool(x, *arguments), x) == []


@pytest.mark.parametrize("name", ["max_pool", "avg_pool"])
@cases
def test_memory_is_less_than_that_of_nnx(name, arguments):
    x = image(8, 30, 30, 32)
    ours, theirs = (
        temporaries(lambda x, m=m: getattr(m, name)(x, *arguments), x) for m in (fcg, nnx)
    )
    assert ours < (theirs if name == "avg_pool" else theirs / 2) + 0.1


def test_a_sum_over_averages_stores_one_array():
    x = image(8, 32, 32, 32)
    assert temporaries(lambda x: fcg.avg_pool(x, (2, 2), (2, 2)), x) < 0.26
    assert temporaries(lambda x: fcg.avg_pool(x, (3, 3), (1, 1)), x) < 1.1


def test_eight_layers_keep_eight_images():
    def layers(module, x):
        pool = functools.partial(module.max_pool, window_shape=(3, 3), padding="SAME")
        return jnp.sum(jax.lax.scan(lambda c, _: (pool(c), None), x, None, 8)[0])

    def size(module):
        x = image(8, 16, 16, 16)
        compiled = jax.jit(jax.grad(functools.partial(layers, module))).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / x.nbytes

    assert size(fcg) < 12
    assert size(nnx) > 15
