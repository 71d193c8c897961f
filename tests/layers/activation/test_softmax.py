"""softmax, log_softmax and logsumexp: as jax.nn, and defined where jax.nn has NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

INF = float("inf")
ROWS = jnp.array(
    [
        [-INF, -INF, -INF],
        [1.0, INF, 2.0],
        [INF, -INF, INF],
        [-INF, 0.0, 0.0],
        [1e30, 1e30, -1e30],
        [3e38, -3e38, 3e38],
    ]
)
SHARES = np.array(
    [[0, 0, 0], [0, 1, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5]]
)
G = jnp.array([1.0, -2.0, 4.0])


def value_and_gradient(f, x, g):
    def both(x, g):
        y, vjp = jax.vjp(f, x)
        return y, vjp(g)[0]

    return jax.jit(both)(x, g)


@pytest.mark.smoke
def test_softmax_has_its_limits():
    y, dx = value_and_gradient(fcg.softmax, ROWS, jnp.broadcast_to(G, ROWS.shape))
    np.testing.assert_allclose(y, SHARES)
    expected = SHARES * (np.asarray(G) - (SHARES * np.asarray(G)).sum(-1, keepdims=True))
    np.testing.assert_allclose(dx, expected)


def test_log_softmax_has_its_limits():
    y, dx = value_and_gradient(fcg.log_softmax, ROWS, jnp.broadcast_to(G, ROWS.shape))
    with np.errstate(divide="ignore"):
        expected = np.log(SHARES)
    expected[4:, :][expected[4:, :] == -INF] = [-2e30, -INF]  # the difference of finite numbers
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-37)
    expected = np.asarray(G) - SHARES * np.asarray(G).sum()
    expected[0] = 0
    np.testing.assert_allclose(dx, expected)


def test_logsumexp_has_its_limits():
    y, dx = value_and_gradient(lambda x: fcg.logsumexp(x, -1), ROWS, jnp.arange(1.0, 7.0))
    np.testing.assert_allclose(y, [-INF, INF, INF, np.log(2), 1e30, 3e38], rtol=1e-6)
    np.testing.assert_allclose(dx, SHARES * np.arange(1, 7)[:, None])


def test_the_largest_number_is_nothing_beside_infinity():
    largest = float(jnp.finfo(jnp.float32).max)
    x = jnp.array([INF, largest, -largest, 0.0])
    np.testing.assert_array_equal(fcg.softmax(x), [1, 0, 0, 0])
    assert abs(fcg.log_softmax(x)[0]) < 1e-37


@pytest.mark.parametrize("f", [fcg.softmax, fcg.log_softmax, lambda x: fcg.logsumexp(x, -1)])
def test_nan_stays(f):
    y = f(jnp.array([[jnp.nan, 1.0], [2.0, 1.0], [jnp.nan, -INF], [jnp.nan, INF]]))
    rows = np.isnan(y).all(-1) if y.ndim == 2 else np.isnan(y)
    assert rows.tolist() == [True, False, True, True]


@pytest.mark.parametrize("where", [[[True], [False]], [[True, False, True], [False] * 3]], ids=str)
def test_a_row_without_elements(where):
    """The mask may hide anything, and a row without any element has no weight."""
    x = jnp.array([[1.0, 2.0, 3.0], [jnp.nan, INF, -INF]])
    where = jnp.array(where)
    seen = jnp.broadcast_to(where, x.shape)[0]
    y, dx = value_and_gradient(lambda x: fcg.softmax(x, where=where), x, jnp.ones((2, 3)))
    np.testing.assert_allclose(y[0], nnx.softmax(x[0], where=seen), rtol=1e-6)
    np.testing.assert_array_equal(y[1], [0, 0, 0])
    np.testing.assert_allclose(dx, np.zeros((2, 3)), atol=1e-6)
    y, dx = value_and_gradient(lambda x: fcg.log_softmax(x, where=where), x, jnp.ones((2, 3)))
    np.testing.assert_allclose(y[0], nnx.log_softmax(x[0], where=seen), rtol=1e-6)
    np.testing.assert_array_equal(y[1], [-INF] * 3)
    np.testing.assert_array_equal(dx[1], [0, 0, 0])
    y, dx = value_and_gradient(lambda x: fcg.logsumexp(x, -1, where=where), x, jnp.ones(2))
    np.testing.assert_allclose(y, [nnx.logsumexp(x[0], where=seen), -INF], rtol=1e-6)
    np.testing.assert_allclose(dx[0], nnx.softmax(x[0], where=seen), rtol=1e-6)
    np.testing.assert_array_equal(dx[1], [0, 0, 0])


def test_logits_near_the_end_of_float16():
    x = jnp.array([6e4, 5.9e4, -6e4], jnp.float16)
    np.testing.assert_array_equal(fcg.softmax(x), [1, 0, 0])
    assert fcg.logsumexp(x) == x[0]
    np.testing.assert_array_equal(jax.grad(fcg.logsumexp)(x), [1, 0, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(dtype):
    x = (3 * jax.random.normal(jax.random.key(0), (50, 100))).astype(dtype)

    @jax.jit
    def program(x):
        functions = (fcg.softmax, fcg.log_softmax, lambda x: fcg.logsumexp(x, -1))
        return [(f(x), f(x.astype(jnp.float32))) for f in functions]

    for y, y32 in program(x):
        assert y.dtype == dtype
        half, full = np.asarray(y, np.float64), np.asarray(y32, np.float64)
        limits = jnp.finfo(dtype)
        np.testing.assert_allclose(
            half, full, rtol=0.51 * float(limits.eps), atol=float(limits.smallest_subnormal)
        )


# Sizes of 0 and 1, axes from either end, none and all of them, and masks. The last element of each
# row is kept, so that jax.nn has a value as well.
SOME, LAST = "some", "of the last axis"
CASES = [
    ((), None, None, False),
    ((), (), None, True),
    ((3,), 0, LAST, False),
    ((3, 0), 0, None, True),
    ((1, 3), -1, SOME, True),
    ((2, 1, 3), (0, -1), SOME, False),
    ((2, 3, 3), 1, None, True),
    ((3, 2, 2), (-2, 2), LAST, False),
    ((2, 2, 3), None, SOME, True),
    ((2, 3), (), None, False),
]


def mask(shape, kind):
    if kind is None:
        return None
    some = jax.random.bernoulli(jax.random.key(1), 0.6, shape if kind == SOME else shape[-1:])
    return some.at[(..., -1)].set(True)


def test_as_jax_nn_in_float64():
    functions = [
        (name, getattr(fcg, name), getattr(jax.nn, name))
        for name in ("softmax", "log_softmax", "logsumexp")
    ]

    def loss(x, f, **kwargs):
        y = f(x, **kwargs)
        finite = jnp.where(jnp.isfinite(y), y, 0)
        return jnp.sum(jnp.sin(finite) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    @jax.jit
    def program(xs):
        results = {}
        for x, (shape, axis, kind, keepdims) in zip(xs, CASES, strict=True):
            for name, *pair in functions:
                kwargs = {"axis": axis, "where": mask(shape, kind)}
                if name == "logsumexp":
                    kwargs["keepdims"] = keepdims
                case = f"{name} {shape} {axis} {kind}"
                results[case] = [
                    jax.value_and_grad(loss, has_aux=True)(x, f, **kwargs) for f in pair
                ]
        return results

    with jax.enable_x64(True):
        xs = [jax.random.normal(jax.random.key(0), shape, jnp.float64) for shape, *_ in CASES]
        for case, (ours, theirs) in program(xs).items():
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=case)


def test_second_derivatives_at_the_largest_element():
    def second(f, x):
        return jax.jacrev(jax.grad(lambda x: jnp.sum(jnp.sin(f(x, axis=-1) * 1.3))))(x)

    @jax.jit
    def program(x):
        names = ("softmax", "log_softmax", "logsumexp")
        return {name: [second(getattr(m, name), x) for m in (fcg, jax.nn)] for name in names}

    with jax.enable_x64(True):
        for name, pair in program(jnp.array([[1.0, 3.0, 2.0], [2.0, 2.0, 0.0]])).items():
            np.testing.assert_allclose(*pair, rtol=1e-12, atol=1e-12, err_msg=name)


def outcome(f, *args, **kwargs):
    try:
        y = jax.eval_shape(lambda *args: f(*args, **kwargs), *args)
    except Exception as error:
        return type(error)
    return jax.tree.map(lambda y: (y.shape, y.dtype, y.weak_type), y)


@pytest.mark.parametrize("f", ["softmax", "log_softmax", "logsumexp"])
def test_dtypes_and_errors_are_those_of_jax_nn(f):
    ours, theirs = (getattr(m, f) for m in (fcg, jax.nn))
    for dtype in ("float32", "bfloat16", "float16", "int32", "bool", "complex64"):
        x = jax.ShapeDtypeStruct((2, 3), dtype)
        assert outcome(ours, x) == outcome(theirs, x), dtype
    for args, kwargs in {
        "weak": ((jnp.asarray(1.0),), {"axis": None}),
        "scalar": ((jnp.ones(()),), {"axis": -1}),
        "no such axis": ((jnp.ones(3),), {"axis": 1}),
        "twice the axis": ((jnp.ones((3, 2)),), {"axis": (0, 0)}),
        "mask of another shape": ((jnp.ones((3, 2)),), {"axis": 0, "where": jnp.ones(3, bool)}),
        "mask of more axes": ((jnp.ones(2),), {"axis": -1, "where": jnp.ones((3, 2), bool)}),
    }.values():
        assert outcome(ours, *args, **kwargs) == outcome(theirs, *args, **kwargs), (args, kwargs)


def test_logsumexp_with_factors_and_signs_is_that_of_jax():
    x, b = jnp.array([1.0, 2.0, -1.0]), jnp.array([1.0, -3.0, 2.0])
    for kwargs in ({"b": jnp.abs(b)}, {"b": b, "return_sign": True}, {"return_sign": True}):
        for ours, theirs in zip(
            jax.tree.leaves(fcg.logsumexp(x, **kwargs)),
            jax.tree.leaves(jax.nn.logsumexp(x, **kwargs)),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(fcg.logsumexp(1j * x), jax.nn.logsumexp(1j * x))
