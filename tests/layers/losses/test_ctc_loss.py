"""CTC: optax's results where labels can be spelled and where not, and long sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_customgrad as fcg

BATCH, FRAMES, CLASSES, N = 8, 7, 5, 3
X = 2 * np.random.default_rng(0).normal(size=(BATCH, FRAMES, CLASSES))
LABELS = np.random.default_rng(1).integers(0, CLASSES, (BATCH, N))
LABELS[1], LABELS[2], LABELS[6] = (2, 2, 2), (3, 3, 1), (1, 4, 0)
LABEL_PADDINGS = (np.arange(N) >= np.array([3, 3, 3, 2, 1, 0, 2, 3])[:, None]).astype(float)
# The last has fewer frames than labels; the second as many as its repeats need.
PADDINGS = (np.arange(FRAMES) >= np.array([7, 5, 5, 7, 6, 3, 2, 2])[:, None]).astype(float)
PADDINGS[3, 2] = 1


def outcome(f, x, *rest, **kwargs):
    """The losses, and the gradient of a sum in which each counts differently."""

    def weighed(x):
        losses = f(x, *map(jnp.asarray, rest), **kwargs)
        return jnp.sum(losses * jnp.cos(jnp.arange(len(losses)))), losses

    (_, losses), dx = jax.jit(jax.value_and_grad(weighed, has_aux=True))(x)
    return losses, dx


@pytest.mark.parametrize("kwargs", [{}, {"blank_id": 2}, {"log_epsilon": -3.0}], ids=str)
def test_as_optax_in_float64(kwargs):
    arguments = (X, PADDINGS, LABELS, LABEL_PADDINGS)
    with jax.enable_x64(True):
        got, expected = (outcome(m.ctc_loss, *arguments, **kwargs) for m in (fcg, optax))
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-11)
        assert kwargs or (got[0][-1] > 1e4 and (got[0][:-1] < 100).all())


def spelled(path, blank=0):
    """What frames spell: repeats merged, blanks left out."""
    merged = [a for n, a in enumerate(path) if n == 0 or a != path[n - 1]]
    return [a for a in merged if a != blank]


def test_the_sum_over_all_paths():
    log_p = np.asarray(jax.nn.log_softmax(X[0, :4]))
    for labels in ([1, 2], [1, 1], [3], []):
        paths = [p for p in np.ndindex(*[CLASSES] * 4) if spelled(p) == labels]
        expected = -np.log(sum(np.exp(log_p[np.arange(4), p].sum()) for p in paths))
        padded = np.array([labels + [0] * (3 - len(labels))])
        got = fcg.ctc_loss(
            X[:1, :4], np.zeros((1, 4)), padded, [(np.arange(3) >= len(labels)).astype(float)]
        )
        np.testing.assert_allclose(got, [expected], rtol=1e-5)


def test_long_sequences_keep_their_digits():
    frames, n, classes = 1000, 40, 20
    x = np.random.default_rng(2).normal(size=(1, frames, classes)) * 3
    labels = np.random.default_rng(3).integers(1, classes, (1, n))
    rest = np.zeros((1, frames)), labels, np.zeros((1, n))
    with jax.enable_x64(True):
        expected, slopes = outcome(fcg.ctc_loss, x, *rest)
    got, dx = outcome(fcg.ctc_loss, x.astype(np.float32), *rest)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(dx, slopes, atol=5e-5)


def test_padding_may_hold_anything():
    x = jnp.asarray(X, jnp.float32).at[0, 5:].set(jnp.nan).at[1, 0, 4].set(-jnp.inf)
    paddings = PADDINGS.copy()
    paddings[0, 5:] = 1
    labels = np.where(LABEL_PADDINGS > 0, -7, LABELS)
    losses, dx = outcome(fcg.ctc_loss, x, paddings, labels, LABEL_PADDINGS)
    assert np.isfinite(losses).all()
    assert np.isfinite(dx).all()
    assert not dx[0, 5:].any()
    np.testing.assert_allclose(np.asarray(dx).sum(-1), 0, atol=1e-5)


def test_paddings_may_be_masks_and_a_traced_label_may_be_none():
    arguments = X[:2], PADDINGS[:2] > 0, LABELS[:2], LABEL_PADDINGS[:2] > 0
    expected = fcg.ctc_loss(X[:2], PADDINGS[:2], LABELS[:2], LABEL_PADDINGS[:2])
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(fcg.ctc_loss(*arguments), expected)
    labels = LABELS[:2].copy()
    labels[0, 1] = 99
    losses, dx = outcome(fcg.ctc_loss, *arguments)
    losses, dx = jax.jit(
        lambda labels: jax.value_and_grad(
            lambda x: fcg.ctc_loss(x, PADDINGS[:2], labels, LABEL_PADDINGS[:2]).sum()
        )(jnp.asarray(X[:2]))
    )(labels)
    assert 0.9e5 < losses < 2e5
    assert np.isfinite(dx).all()


@pytest.mark.parametrize(("frames", "n"), [(0, 2), (3, 0), (0, 0)])
def test_no_frames_and_no_labels(frames, n):
    x = jnp.asarray(X[:2, :frames])
    rest = np.zeros((2, frames)), LABELS[:2, :n], np.zeros((2, n))
    losses, dx = outcome(fcg.ctc_loss, x, *rest)
    if frames or not n:
        expected = -jax.nn.log_softmax(x)[..., 0].sum(-1)
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
    else:
        assert (losses > 1e4).all()
    assert dx.shape == x.shape


def test_half_precision_is_computed_in_float32():
    rest = PADDINGS, LABELS, LABEL_PADDINGS
    x = jnp.asarray(X, jnp.bfloat16)
    got, dx = outcome(fcg.ctc_loss, x, *rest)
    expected, slopes = outcome(fcg.ctc_loss, x.astype(jnp.float32), *rest)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_array_equal(dx, slopes.astype(jnp.bfloat16))


def test_less_memory_than_autodiff_of_optax():
    x = jnp.ones((4, 100, 16))
    rest = jnp.zeros((4, 100)), jnp.ones((4, 30), int), jnp.zeros((4, 30))

    def temporaries(f):
        gradient = jax.jit(jax.grad(lambda x: f(x, *rest).sum()))
        return gradient.lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(fcg.ctc_loss) < 0.6 * temporaries(optax.ctc_loss)


REFUSED = {
    "shapes": ((X[0], PADDINGS, LABELS, LABEL_PADDINGS), {}, ValueError, "expected shapes"),
    "blank": (
        (X, PADDINGS, LABELS, LABEL_PADDINGS),
        {"blank_id": 5},
        ValueError,
        "blank_id=5 is none of the 5 classes",
    ),
    "label": (
        (X, PADDINGS, LABELS + 5, LABEL_PADDINGS),
        {},
        ValueError,
        "is none of the 5 classes",
    ),
    "padding in front": (
        (X, PADDINGS, LABELS, LABEL_PADDINGS[:, ::-1]),
        {},
        ValueError,
        "a label follows padding",
    ),
    "logits": ((LABELS, PADDINGS, LABELS, LABEL_PADDINGS), {}, TypeError, "logits are int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    arguments, kwargs, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        fcg.ctc_loss(*arguments, **kwargs)
