"""The softmax cross entropies: optax's results, limits where optax has NaN, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_customgrad as fcg
from flax_customgrad.contract.residual_storage import inspecting_residuals

INF = float("inf")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)) * 3
LABELS = np.array([[0, 3, 1], [2, 2, 0]])
Y = RNG.random(X.shape)
Y /= Y.sum(-1, keepdims=True)
WHERE = np.arange(24).reshape(X.shape) % 4 != 1
WHERE[1, 0] = False
integers = optax.softmax_cross_entropy_with_integer_labels
distributions = optax.softmax_cross_entropy


def weighed_gradient(f):
    """A function and its gradient, of which each loss counts differently."""

    def weighed(x, *rest):
        losses = f(x, *rest)
        return jnp.sum(losses * jnp.cos(jnp.arange(losses.size)).reshape(losses.shape)), losses

    return jax.value_and_grad(weighed, has_aux=True)


def case(theirs, *labels, ours=fcg.softmax_cross_entropy, **kwargs):
    return theirs, ours, labels, kwargs


OURS = fcg.softmax_cross_entropy_with_integer_labels
CASES = {
    "integers": case(integers, LABELS),
    "integers by their own name": case(integers, LABELS, ours=OURS),
    "first axis": case(integers, LABELS[0, 0] + np.zeros((3, 4), int), axis=0),
    "two axes": case(integers, np.array([11, 4]), ours=OURS, axis=(1, 2)),
    "two axes, the later first": case(integers, np.array([11, 4]), ours=OURS, axis=(-1, 1)),
    "labels of one row": case(integers, LABELS[:1]),
    "unsigned labels": case(integers, LABELS.astype(np.uint8)),
    "integers, some classes": case(integers, LABELS, where=WHERE),
    "integers, some rows": case(integers, LABELS, where=WHERE[..., 0]),
    "distributions": case(distributions, Y),
    "one for all rows": case(distributions, Y[0, 0]),
    "one-hot integers": case(distributions, np.eye(4, dtype=int)[LABELS]),
    "middle axis": case(distributions, Y, axis=1),
    "all axes": case(distributions, Y, axis=None),
    "axes in a tuple": case(distributions, Y, axis=(0, -1)),
    "some classes": case(distributions, Y, where=WHERE),
    "some rows": case(distributions, Y, where=WHERE[..., 0]),
}


def test_as_optax_in_float64():
    def outcomes(x):
        found = {}
        for name, (theirs, ours, labels, kwargs) in CASES.items():
            labels = tuple(map(jnp.asarray, labels))
            kwargs = {k: jnp.asarray(v) if k == "where" else v for k, v in kwargs.items()}
            found[name] = [
                weighed_gradient(lambda x, f=f, l=labels, k=kwargs: f(x, *l, **k))(x)
                for f in (ours, theirs)
            ]
        return found

    with jax.enable_x64(True):
        for name, (got, expected) in jax.jit(outcomes)(X).items():
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                if np.isnan(b).any():  # in optax, the gradient of a row of which nothing counts
                    assert not a[np.isnan(b)].any()
                    a, b = np.nan_to_num(a), np.nan_to_num(b)
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


def test_the_gradient_of_distributions():
    def loss(f):
        return jax.jit(jax.grad(lambda y: jnp.sum(jnp.sin(f(X, y)))))

    with jax.enable_x64(True):
        np.testing.assert_allclose(
            loss(fcg.softmax_cross_entropy)(Y), loss(distributions)(Y), rtol=1e-12
        )
        got, expected = (
            jax.grad(lambda y, f=f: jnp.sum(f(X, y)))(Y[0, 0])
            for f in (fcg.softmax_cross_entropy, distributions)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("labels", [LABELS, Y], ids=["integers", "distributions"])
def test_smoothing_and_z_loss_by_their_formulas(labels):
    def expected(x):
        y = jax.nn.one_hot(labels, 4) if labels.ndim == 2 else labels
        return distributions(x, optax.smooth_labels(y, 0.2)) + 0.3 * jax.nn.logsumexp(x, -1) ** 2

    def ours(x):
        return fcg.softmax_cross_entropy(x, labels, label_smoothing=0.2, z_loss=0.3)

    with jax.enable_x64(True):
        for a, b in zip(
            *(jax.tree.leaves(jax.jit(weighed_gradient(f))(X)) for f in (ours, expected)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


# Rows that do not count, and infinite logits.


@pytest.mark.parametrize("traced", [False, True])
def test_an_ignored_row_has_neither_loss_nor_gradient(traced):
    x = jnp.asarray(X[0], jnp.float32).at[1].set(jnp.nan)
    labels = jnp.array([0, -100, 1])

    def loss(x, labels):
        losses = fcg.softmax_cross_entropy(
            x, labels, ignore_index=-100, label_smoothing=0.1, z_loss=0.1
        )
        return jnp.sum(losses), losses

    gradient = jax.value_and_grad(loss, has_aux=True)
    (_, losses), dx = (jax.jit(gradient) if traced else gradient)(x, labels)
    assert losses[1] == 0
    np.testing.assert_array_equal(dx[1], np.zeros(4))
    assert np.isfinite(dx).all()
    assert (losses[::2] > 0).all()


def test_a_label_that_is_no_class_is_an_error_or_has_no_loss():
    for labels in ([0, 4, 1], [0, -1, 1]):
        with pytest.raises(ValueError, match=rf"the label {labels[1]} is none of the 4 classes"):
            fcg.softmax_cross_entropy(X[0], jnp.array(labels))
        losses = jax.jit(fcg.softmax_cross_entropy)(X[0], jnp.array(labels))
        assert losses[1] == 0
        assert (losses[::2] > 0).all()
    # What does not count need not be a class.
    where = jnp.array([True, False, True])
    assert fcg.softmax_cross_entropy(X[0], jnp.array([0, 9, 1]), where=where)[1] == 0


def test_infinite_logits():
    x = jnp.array([[-INF, 1.0, 1.0], [1.0, -INF, 1.0], [-INF, -INF, -INF], [INF, 0.0, 0.0]])
    labels = jnp.array([1, 1, 0, 0])
    y = jax.nn.one_hot(labels, 3)
    expected_dx = [[0, -0.5, 0.5], [0.5, -1, 0.5], [0, 0, 0], [0, 0, 0]]
    for target in (labels, y):
        losses, pull = jax.vjp(lambda x, t=target: fcg.softmax_cross_entropy(x, t), x)
        np.testing.assert_allclose(losses, [np.log(2), INF, INF, 0], rtol=1e-6, atol=1e-37)
        np.testing.assert_allclose(pull(jnp.ones(4))[0], expected_dx, rtol=1e-6)
    dy = jax.grad(lambda y: fcg.softmax_cross_entropy(x[:1], y).sum())(y[:1])
    np.testing.assert_allclose(dy, [[0, np.log(2), np.log(2)]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("labels", [LABELS, Y], ids=["integers", "distributions"])
def test_half_precision_is_computed_in_float32(dtype, labels):
    x, labels = jnp.asarray(X, dtype), jnp.asarray(labels)
    got, pull = jax.vjp(lambda x: fcg.softmax_cross_entropy(x, labels), x)
    expected, pull32 = jax.vjp(
        lambda x: fcg.softmax_cross_entropy(x, labels), x.astype(jnp.float32)
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    (dx,), (dx32,) = pull(jnp.ones_like(got)), pull32(jnp.ones_like(got))
    assert dx.dtype == dtype
    np.testing.assert_array_equal(dx, dx32.astype(dtype))


def test_a_long_row_keeps_its_digits():
    """Offsets cancel, and a thousand likely classes add up."""
    x = jnp.asarray(RNG.normal(size=(2, 1000)), jnp.float32)
    plain = fcg.softmax_cross_entropy(x, jnp.array([0, 999]))
    np.testing.assert_allclose(
        fcg.softmax_cross_entropy(x.at[:].add(4096.0), jnp.array([0, 999])), plain, rtol=2e-4
    )
    exact = np.asarray(x, np.float64)
    exact = np.log(np.exp(exact).sum(-1)) - exact[[0, 1], [0, 999]]
    np.testing.assert_allclose(plain, exact, rtol=1e-6)


def test_only_numbers_of_rows_are_kept():
    x = jnp.asarray(X, jnp.bfloat16)
    for labels in (jnp.asarray(LABELS), jnp.asarray(Y)):
        with inspecting_residuals():
            found = fcg.residuals(lambda x, y=labels: fcg.softmax_cross_entropy(x, y), x)
        sizes = [r.nbytes for r in found if str(r.dtype) == "float32" and r.shape == (2, 3, 1)]
        assert len(sizes) == 2
        of_logits = [r for r in found if r.shape == x.shape and not r.is_argument]
        assert [str(r.dtype) for r in of_logits] in ([], ["float32"])  # the distributions


REFUSED = {
    "integer logits": (lambda: fcg.softmax_cross_entropy(LABELS, LABELS), TypeError, "logits are"),
    "shape of labels": (
        lambda: fcg.softmax_cross_entropy(X, LABELS[:, :2]),
        ValueError,
        r"labels have shape \(2, 2\)",
    ),
    "shape of distributions": (
        lambda: fcg.softmax_cross_entropy(X, Y[..., :3]),
        ValueError,
        "do not broadcast",
    ),
    "shape of where": (
        lambda: fcg.softmax_cross_entropy(X, LABELS, where=WHERE[:, :2]),
        ValueError,
        "where has shape",
    ),
    "ignored distributions": (
        lambda: fcg.softmax_cross_entropy(X, Y, ignore_index=0),
        TypeError,
        "ignore_index=0 is for integer labels",
    ),
    "float labels": (lambda: OURS(X, LABELS.astype(float)), TypeError, "expected integers"),
    "smoothing": (
        lambda: fcg.softmax_cross_entropy(X, LABELS, label_smoothing=1.0),
        ValueError,
        "label_smoothing=1.0 must be from 0 to below 1",
    ),
    "axis": (lambda: fcg.softmax_cross_entropy(X, LABELS, 3), ValueError, "axis=3 is not of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("shape", "labels"), [((0, 3), (0,)), ((3,), ()), ((2, 0, 4), (2, 0)), ((2, 1), (2,))], ids=str
)
def test_odd_shapes(shape, labels):
    x, labels = jnp.ones(shape), jnp.zeros(labels, int)
    losses = fcg.softmax_cross_entropy(x, labels)
    np.testing.assert_allclose(losses, np.full(labels.shape, np.log(shape[-1])), rtol=1e-6)
    assert jax.grad(lambda x: fcg.softmax_cross_entropy(x, labels).sum())(x).shape == shape
