"""dot_product_attention beside that of nnx, and where that has NaN, no windows and no segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_customgrad as fcg

RNG = np.random.default_rng(0)
T, S, N, D = 20, 26, 4, 8
INF = float("inf")


def normal(*shape, dtype=np.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def heads(*batch, rows=T, keys=S, of_keys=N, dtype=np.float32):
    shapes = (rows, N), (keys, of_keys), (keys, of_keys)
    return tuple(normal(*batch, *shape, D, dtype=dtype) for shape in shapes)


def value_and_gradients(f, *arrays):
    """The value, and the gradients of queries, keys, values and a bias; the fifth is a mask."""
    floats = [
        i
        for i, a in enumerate(arrays)
        if a is not None and jnp.issubdtype(a.dtype, jnp.floating) and i != 4
    ]

    def loss(*arrays):
        y = f(*arrays)
        return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, floats, has_aux=True))(*arrays)
    return y, *gradients


def assert_same(got, expected, tolerance=2e-6):
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(initial=0), 1))


def masked(*shape):
    """A mask that hides about a third, and never the first key."""
    return jnp.asarray((RNG.random(shape) < 0.7) | (np.arange(shape[-1]) == 0))


TILES = {"tile_size": (8, 7)}
GRADIENTS = {
    "one tile": (heads(2), {}),
    "causal": (heads(2), {"is_causal": True, **TILES}),
    "one head of keys, bias of each key, mask": (
        (*heads(2, of_keys=1), normal(2, 1, 1, S), masked(2, 1, T, 1)),
        TILES,
    ),
    "groups, bias of each head, mask of each key": (
        (*heads(2, of_keys=2), normal(1, N, T, S), masked(2, 1, 1, S)),
        TILES,
    ),
    "bfloat16, a wider bias": ((*heads(2, dtype=jnp.bfloat16), normal(2, N, T, S)), TILES),
    "dropout": (heads(2), {"dropout_rate": 0.3, "dropout_rng": jax.random.key(1), **TILES}),
    "dropout, each its own draws, groups": (
        heads(2, of_keys=2),
        {
            "dropout_rate": 0.3,
            "dropout_rng": jax.random.PRNGKey(1),
            "broadcast_dropout": False,
            **TILES,
        },
    ),
}
VALUES = {
    "causal, more queries than keys": (heads(2, keys=9), {"is_causal": True, **TILES}),
    "no batch axis": (heads(), {"is_causal": True}),
    "two batch axes": (heads(2, 3), {"is_causal": True}),
    "mask of numbers": ((*heads(2), None, 1.0 * masked(2, 1, T, S)), {"is_causal": True}),
    "a dtype": (heads(2), {"dtype": jnp.bfloat16}),
    "dropout of nothing": (heads(2), {"dropout_rate": 0.3, "deterministic": True}),
    "another promotion": (
        heads(2),
        {"promote_dtype": lambda arrays, dtype: [a.astype(jnp.bfloat16) for a in arrays]},
    ),
}


def ours_and_theirs(kwargs):
    of_nnx = {name: value for name, value in kwargs.items() if name != "tile_size"}
    return (
        lambda *arrays: fcg.dot_product_attention(*arrays, **kwargs),
        lambda *arrays: nnx.dot_product_attention(*arrays, **of_nnx),
    )


@pytest.mark.parametrize("case", GRADIENTS)
def test_it_is_the_function_of_nnx(case):
    arrays, kwargs = GRADIENTS[case]
    got, expected = (value_and_gradients(f, *arrays) for f in ours_and_theirs(kwargs))
    assert_same(got, expected, 2e-2 if "bfloat16" in case else 2e-6)


@pytest.mark.parametrize("case", VALUES)
def test_it_takes_what_nnx_takes(case):
    arrays, kwargs = VALUES[case]
    got, expected = (jax.jit(f)(*arrays) for f in ours_and_theirs(kwargs))
    assert_same([got], [expected], 2e-2 if got.dtype == jnp.bfloat16 else 2e-6)


def test_arrays_of_numpy_and_several_dtypes():
    q, k, v = heads(2)
    arrays = np.asarray(q), nnx.Param(k.astype(jnp.bfloat16)), v
    mask = np.ones((2, 1, T, S), bool)
    got, expected = (
        lib.dot_product_attention(*arrays, mask=mask, precision=["high", "high"], dropout_rate=0)
        for lib in (fcg, nnx)
    )
    assert_same([got], [expected])


def dense(q, k, v, seen):
    """Attention in float64, written down; 0 where a query sees no key."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    s = np.einsum("...tnd,...snd->...nts", q, k) / np.sqrt(D)
    e = np.where(seen, np.exp(s), 0)
    total = e.sum(-1, keepdims=True)
    return np.einsum("...nts,...snd->...tnd", e / np.where(total, total, 1), v)


@pytest.mark.parametrize("window", [3, (3, 0), (None, 2), (0, None)])
def test_a_window(window):
    left, right = window if isinstance(window, tuple) else (window, window)
    offset = np.arange(S) - np.arange(T)[:, None]
    seen = (offset >= -(S if left is None else left)) & (offset <= (S if right is None else right))
    q, k, v = heads(2)
    got = fcg.dot_product_attention(q, k, v, window=window, tile_size=5)
    np.testing.assert_allclose(got, dense(q, k, v, seen), atol=2e-6)
    with fcg.use_autodiff():  # by nnx, with a mask
        np.testing.assert_allclose(
            fcg.dot_product_attention(q, k, v, window=window), got, atol=2e-6
        )


def test_packed_sequences_are_sequences_by_themselves():
    q, k, v = heads(2, keys=T)
    lengths = 7, 9, 4
    ids = np.repeat(np.arange(3), lengths)
    ends = np.cumsum(lengths)

    def alone(q, k, v):
        parts = [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
        one = [
            nnx.dot_product_attention(*(a[:, part] for a in (q, k, v)), is_causal=True)
            for part in parts
        ]
        return jnp.concatenate(one, 1)

    def packed(q, k, v):
        return fcg.dot_product_attention(q, k, v, is_causal=True, segment_ids=ids, tile_size=8)

    got = value_and_gradients(packed, q, k, v)
    assert_same(got, value_and_gradients(alone, q, k, v))
    with fcg.use_autodiff():
        assert_same([packed(q, k, v)], got[:1])


def test_segments_of_each_example_and_of_keys():
    q, k, v = heads(2)
    ids, of_keys = jnp.arange(T) // 7 + jnp.array([[0], [1]]), jnp.arange(S) // 9
    seen = np.asarray(ids[:, None, :, None] == of_keys)
    got = fcg.dot_product_attention(q, k, v, segment_ids=ids, key_segment_ids=of_keys, tile_size=8)
    np.testing.assert_allclose(got, dense(q, k, v, seen), atol=2e-6)


@pytest.mark.parametrize("by", ["mask", "bias"])
def test_a_query_that_sees_no_key_has_output_and_gradient_0(by):
    """Also where NaN is an error: nnx has the mean of the values, or NaN."""
    q, k, v = heads(2)
    mask = masked(2, 1, T, S).at[:, :, 3].set(False)
    bias = jnp.where(mask, 0.0, -INF)

    def f(q, k, v, bias):
        masks = {"mask": mask} if by == "mask" else {"bias": bias}
        return fcg.dot_product_attention(q, k, v, **masks, **TILES)

    with jax.debug_nans(True):
        y, dq, *others = value_and_gradients(f, q, k, v, bias)
    np.testing.assert_allclose(y, dense(q, k, v, np.asarray(mask)), atol=2e-6)
    assert not np.any(y[:, 3])
    assert not np.any(dq[:, 3])
    assert all(np.isfinite(a).all() for a in others)
    assert [bool(np.any(a)) for a in others] == [True, True, by == "bias"]


def test_scores_beyond_the_largest_float16():
    q, k, v = heads(2, dtype=jnp.float16)
    q, k = 200 * q, 200 * k
    best = jnp.einsum("btnd,bsnd->btns", *(a.astype(jnp.float32) for a in (q, k)))
    assert jnp.abs(best).max() > 65504
    y, *gradients = value_and_gradients(fcg.dot_product_attention, q, k, v)
    # Nothing but the best key counts.
    expected = jnp.take_along_axis(v, jnp.argmax(best, -1)[..., None], 1)
    np.testing.assert_allclose(y, expected, rtol=2e-3)
    assert all(np.isfinite(a).all() for a in gradients)


def test_the_gradient_of_draws_that_depend_on_the_tiles():
    """With a key of another kind a tile has draws of its own, the same forward and backward."""
    q, k, v = heads(2)
    key = jax.random.key(0, impl="rbg")

    def f(q, k, v):
        return fcg.dot_product_attention(q, k, v, dropout_rng=key, dropout_rate=0.4, **TILES)

    along, g = heads(2), normal(*q.shape)
    _, tangent = jax.jit(lambda a, b: jax.jvp(f, a, b))((q, k, v), along)
    pulled = jax.jit(lambda g: jax.vjp(f, q, k, v)[1](g))(g)
    dots = [jnp.vdot(a, b) for a, b in zip(pulled, along, strict=True)]
    np.testing.assert_allclose(sum(dots), jnp.vdot(tangent, g), rtol=1e-4)
    # Values of one: what is left of them is the part that is kept, on average as much.
    kept = fcg.dot_product_attention(
        0 * q, k, jnp.ones_like(v), dropout_rng=key, dropout_rate=0.4, **TILES
    )
    assert 0.85 < kept.mean() < 1.15
    assert len(np.unique(kept[0, :, 0, 0])) > 4


def test_no_queries_and_no_keys():
    for rows, keys in ((0, 3), (3, 0)):
        q, k, v = heads(2, rows=rows, keys=keys)
        y, *gradients = value_and_gradients(fcg.dot_product_attention, q, k, v)
        assert y.shape == q.shape
        assert not any(np.any(a) for a in (y, *gradients))


class Sower(nnx.Module):
    """A Module that the weights can be sown into."""


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_computes_as_nnx_does():
    q, k, v = heads(2)

    def traced(*arrays, **kwargs):
        return str(jax.make_jaxpr(lambda *a: fcg.dot_product_attention(*a, **kwargs))(*arrays))

    assert "attention" in traced(q, k, v)
    by_nnx = [
        traced(*(a.astype(jnp.complex64) for a in (q, k, v)), dropout_rate=0.5, deterministic=True),
        traced(q, k, v, bias=jnp.ones((2, N, T, S), int)),
    ]
    with fcg.use_autodiff():
        by_nnx.append(traced(q, k, v))
    assert not any("name=attention" in text or "_Operation" in text for text in by_nnx)
    module = Sower()
    y = fcg.dot_product_attention(q, k, v, module=module, is_causal=True, window=2)
    (weights,) = module.attention_weights.get_value()
    assert weights.shape == (2, N, T, S)
    assert np.count_nonzero(weights[0, 0, 5]) == 3
    np.testing.assert_allclose(
        y, fcg.dot_product_attention(q, k, v, is_causal=True, window=2), atol=2e-6
    )


def test_errors():
    q, k, v = heads(2)

    def refused(words, *arrays, **kwargs):
        with pytest.raises(ValueError, match=words):
            fcg.dot_product_attention(*(arrays or (q, k, v)), **kwargs)

    refused("must be in", dropout_rate=1.0)
    refused("needs a key", dropout_rate=0.5)
    refused("give both", segment_ids=jnp.zeros((2, T), int))
    refused("give both", key_segment_ids=jnp.zeros((2, S), int))
    refused(
        "key_segment_ids has shape",
        segment_ids=jnp.zeros((2, T), int),
        key_segment_ids=jnp.zeros((2, T), int),
    )
    refused("segment_ids has shape", q, q, q, segment_ids=jnp.zeros((2, T)))
    refused("window=-1", window=-1)
    refused("tile_size=0", tile_size=0)
    # What does not fit together has the errors of nnx.
    refused("must match", q, k[:1], v)
    refused("multiple of", q, k[:, :, :3], v[:, :, :3])


def test_large_scores_cost_no_digits_of_a_gradient():
    """The weight of a key that wins by far is 1, and not 1 within the rounding of its score."""
    keys = 100 * jnp.eye(4, D).reshape(1, 4, 1, D)
    *_, dv = value_and_gradients(fcg.dot_product_attention, 3 * keys + 1, keys + 1, keys)
    np.testing.assert_allclose(dv[..., 0], jnp.cos(jnp.arange(4.0) * D)[None, :, None], rtol=1e-6)


@pytest.mark.parametrize("of_keys", [4, 2])
def test_heads_that_are_split_over_devices_stay_split(of_keys):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    split = P("data", None, "model", None)
    with jax.set_mesh(mesh):
        # Two heads of keys cannot be split over four devices.
        q, k = (
            jax.ShapeDtypeStruct((4, T, n, D), "float32", sharding=NamedSharding(mesh, spec))
            for n, spec in ((4, split), (of_keys, split if of_keys == 4 else P("data")))
        )
        assert jax.eval_shape(fcg.dot_product_attention, q, k, k).sharding.spec == split
