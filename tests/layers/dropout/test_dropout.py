"""Dropout draws nnx's masks, advances nnx's streams, and keeps what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.contract.residual_storage import inspecting_residuals

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 11)), jnp.float32)
RESIDUALS = ("mask", "bits", "key")


@nnx.jit
def twice(layer, x):
    """Two values, the gradient of each, and how far the stream has advanced."""
    gradient = nnx.value_and_grad(lambda layer, x: jnp.sum(jnp.sin(layer(x))), argnums=1)
    return [gradient(layer, x), gradient(layer, x), nnx.state(layer, nnx.RngCount)]


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


FORMS = {
    "alone": {},
    "axes shared": {"broadcast_dims": (0, -1)},
    "axes in a list": {"broadcast_dims": [1]},
    "another stream": {"rng_collection": "noise"},
    "rate of NumPy": {"rate": np.float32(0.3)},
    "nothing dropped": {"rate": 0},
    "all dropped": {"rate": 1.0},
    "off": {"deterministic": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_gradients_and_streams_are_those_of_nnx_to_the_bit(form):
    kwargs = {"rate": 0.3, **FORMS[form]}
    layers = [m.Dropout(**kwargs, rngs=nnx.Rngs(0, noise=1)) for m in (fcg, nnx)]
    assert_same(*(twice(layer, X) for layer in layers))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_changes_no_bit(residual, dtype):
    ours = fcg.Dropout(0.3, broadcast_dims=(1,), residual=residual, rngs=nnx.Rngs(0))
    theirs = nnx.Dropout(0.3, broadcast_dims=(1,), rngs=nnx.Rngs(0))
    assert_same(twice(ours, X.astype(dtype)), twice(theirs, X.astype(dtype)))


@pytest.mark.parametrize(
    "rngs",
    [lambda: nnx.Rngs(3), lambda: nnx.Rngs(3).dropout, lambda: jax.random.key(3)],
    ids=["Rngs", "stream", "key"],
)
def test_random_numbers_from_the_call(rngs):
    given = [rngs(), rngs()]
    ys = [m.Dropout(0.5)(X, rngs=r) for m, r in zip((fcg, nnx), given, strict=True)]
    np.testing.assert_array_equal(*(y == 0 for y in ys))
    np.testing.assert_allclose(*ys, rtol=1e-6)
    if isinstance(given[0], nnx.Pytree):
        assert_same(*(nnx.state(r, nnx.RngCount) for r in given))


def test_modes_are_set_as_for_nnx():
    layer = fcg.Dropout(0.5, rngs=nnx.Rngs(0))
    layer.eval()
    assert layer(X) is X
    layer.train()
    assert (layer(X) == 0).any()
    assert nnx.view(layer, deterministic=True)(X) is X
    assert layer(X, deterministic=True) is X
    assert int(layer.rngs.count[...]) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.Dropout(0.5)(X),
        lambda m: m.Dropout(0.5, deterministic=None, rngs=nnx.Rngs(0))(X),
        lambda m: m.Dropout(0.5)(X, rngs=0),
        lambda m: m.Dropout(0.5, rngs=0),
    ],
)
def test_errors_are_those_of_nnx(call):
    messages = []
    for library in (fcg, nnx):
        with pytest.raises((TypeError, ValueError)) as error:
            call(library)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_convert_changes_only_the_class():
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    expected = nnx.clone(model)(X)
    layer = fcg.convert(model).layers[0]
    assert type(layer) is fcg.Dropout
    np.testing.assert_allclose(model(X), expected, rtol=1e-6)
    assert vars(fcg.Dropout(0.5)).keys() == vars(nnx.Dropout(0.5)).keys()


def test_a_traced_rate_compiles_once_and_has_no_gradient():
    key = jax.random.key(0)

    @jax.jit
    def gradients(x, rate):
        return jax.value_and_grad(lambda x, r: jnp.sum(fcg.dropout(x, key, r) ** 2), (0, 1))(
            x, rate
        )

    for rate in (0.0, 0.3, 1.0):
        value, (dx, drate) = gradients(X, jnp.asarray(rate))
        y = fcg.dropout(X, key, rate)
        np.testing.assert_allclose(value, jnp.sum(y * y), rtol=1e-5)
        np.testing.assert_allclose(dx, 2 * y / max(1 - rate, 1e-9) * (y != 0), rtol=1e-5)
        assert drate == 0
    assert gradients._cache_size() == 1


def test_what_is_refused():
    with pytest.raises(ValueError, match="residual='nothing' is none of 'mask', 'bits', 'key'"):
        fcg.Dropout(0.5, residual="nothing")
    with pytest.raises(ValueError, match=r"rate=1.5 must be from 0 to 1"):
        fcg.dropout(X, jax.random.key(0), 1.5)
    with pytest.raises(TypeError, match="x is int32"):
        fcg.dropout(jnp.arange(3), jax.random.key(0), 0.5)


def kept(residual, **kwargs):
    with inspecting_residuals():
        found = fcg.residuals(
            lambda x: fcg.dropout(x, jax.random.key(0), 0.5, residual=residual, **kwargs), X
        )
    return sorted((str(r.dtype), r.shape) for r in found if not r.is_argument)


def test_bits_are_kept_or_the_mask_or_the_key():
    assert ("uint8", (4, 3, 2)) in kept("bits")
    assert ("bool", (4, 3, 11)) in kept("mask")
    assert ("uint8", (4, 1, 2)) in kept("bits", broadcast_dims=(1,))
    assert not [shape for _, shape in kept("key") if len(shape) == 3]


def temporaries(f):
    """Memory of the gradient of eight layers in a scan, in sizes of the input."""
    x, keys = jnp.ones((128, 512)), jax.random.split(jax.random.key(0), 8)

    def loss(x, keys):
        y, _ = jax.lax.scan(lambda x, key: (f(x, key), None), x, keys)
        return jnp.sum(y * y)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(x, keys).compile()
    return compiled.memory_analysis().temp_size_in_bytes / x.nbytes


def test_eight_layers_take_no_more_than_those_of_nnx():
    theirs = temporaries(lambda x, key: nnx.Dropout(0.1)(x, rngs=key))
    mask, bits, key = (
        temporaries(lambda x, key, r=r: fcg.Dropout(0.1, residual=r)(x, rngs=key))
        for r in RESIDUALS
    )
    assert mask < theirs + 0.1
    assert key < bits < theirs - 1.5
