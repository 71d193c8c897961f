"""Functions that a model calls by name: ours inside of `functions`, and untouched anywhere else."""

import functools
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import gelu as imported_gelu

import flax_customgrad as fcg
from flax_customgrad import catalogue
from flax_customgrad.model.functions import NAMESPACES

ENTRIES = [entry for entry in catalogue.entries() if entry.is_function and entry.is_drop_in]
X = jnp.linspace(-2, 2, 24).reshape(2, 3, 4)


def namespaces():
    """What each namespace holds under each name."""
    modules = {path: sys.modules[path] for path in NAMESPACES if path in sys.modules}
    return {(path, name): a for path, module in modules.items() for name, a in vars(module).items()}


def assert_untouched(before):
    after = namespaces()
    assert set(after) == set(before)
    assert [key for key in before if after[key] is not before[key]] == []


def kept(function, *args):
    """The bytes that a backward keeps; arguments other than floating arrays are static."""
    trained = [isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.inexact) for a in args]

    def of_arrays(*arrays):
        arrays = iter(arrays)
        return function(*(next(arrays) if t else a for t, a in zip(trained, args, strict=True)))

    return fcg.residual_bytes(of_arrays, *(a for t, a in zip(trained, args, strict=True) if t))


def block(x):
    return nnx.softmax(jax.nn.gelu(2 * x))


KEPT_BY_NNX, KEPT_BY_OURS = kept(block, X), kept(lambda x: fcg.softmax(fcg.gelu(2 * x)), X)


def test_the_numbers_below_tell_ours_from_those_of_nnx():
    assert KEPT_BY_OURS < KEPT_BY_NNX / 2


# Which functions


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_each_name_is_ours_inside_and_jax_s_own_under_use_autodiff(entry):
    """Its fallbacks reach the function of JAX, and not itself again."""
    namespace = nnx if hasattr(nnx, entry.name) else jax.nn
    for example, make in entry.examples.items():
        ours, *args = make(entry.module)
        if entry.name == "dot_product_attention" and "tile_size" in getattr(ours, "keywords", ()):
            continue  # It has arguments that nnx has not.
        theirs, *_ = make(entry.reference)
        expected = kept(ours, *args)
        with fcg.use_autodiff():
            expected_by_jax = kept(ours, *args)
        with fcg.functions():
            inside, *_ = make(getattr(namespace, entry.name))
            if example not in ("bits", "output"):  # Those have an argument that nnx has not.
                assert kept(inside, *args) == expected
                with fcg.use_autodiff():
                    assert kept(inside, *args) == expected_by_jax
        # Taken along, it is that of nnx again.
        assert kept(inside, *args) == kept(theirs, *args)


def test_fallbacks_for_integers_and_complex_numbers():
    with fcg.functions():
        assert nnx.relu(jnp.arange(3)).dtype == jnp.int32
        assert nnx.softmax(jnp.ones(2, complex)).dtype == jnp.complex64
        assert nnx.max_pool(jnp.ones((1, 2, 2, 1), int), (2, 2)).shape == (1, 1, 1, 1)


def test_a_function_of_ours_may_call_the_name_that_it_stands_for(monkeypatch):
    def ours(x):
        return 2 * nnx.gelu(x)

    monkeypatch.setattr(catalogue, "drop_in_functions", lambda: {nnx.gelu: ours})
    # The two are one table: an entry of the second outlives no dispatcher, whose id it has.
    for table in ("_dispatchers", "_originals"):
        monkeypatch.setattr(sys.modules["flax_customgrad.model.functions"], table, {})
    expected = 2 * nnx.gelu(X)
    with fcg.functions():
        np.testing.assert_array_equal(jax.nn.gelu(X), expected)


def test_names_of_jax_numpy_and_imported_names_stay():
    tanh = jnp.tanh
    with fcg.functions():
        assert jnp.tanh is tanh
        assert kept(imported_gelu, X) > kept(nnx.gelu, X)
        assert jax.nn.tanh is nnx.tanh is not tanh


# Where and when


def test_the_namespaces_are_left_as_they_were():
    before = namespaces()
    with fcg.functions():
        assert nnx.gelu is not before["flax.nnx", "gelu"]
        assert nnx.gelu is jax.nn.gelu is nnx.nn.activations.gelu
        assert kept(block, X) == KEPT_BY_OURS
        with fcg.functions():
            assert kept(block, X) == KEPT_BY_OURS
        assert kept(block, X) == KEPT_BY_OURS
    assert_untouched(before)
    with pytest.raises(ZeroDivisionError), fcg.functions():
        raise ZeroDivisionError
    assert_untouched(before)
    assert kept(block, X) == KEPT_BY_NNX


def test_what_somebody_else_puts_there_stays():
    before = nnx.gelu
    try:
        nnx.gelu = first = lambda x: x
        with fcg.functions():
            assert nnx.gelu is first
            nnx.relu = second = lambda x: x
        assert (nnx.gelu, nnx.relu) == (first, second)
    finally:
        nnx.gelu, nnx.relu = before, jax.nn.relu


def test_a_decorator_of_a_step():
    before = namespaces()
    assert kept(fcg.functions()(block), X) == KEPT_BY_OURS
    assert_untouched(before)
    assert kept(jax.checkpoint(fcg.functions()(block)), X) == 0


def test_what_was_traced_outside_is_traced_anew_inside():
    compiled = jax.jit(block)
    outside = kept(compiled, X)
    with fcg.functions():
        assert kept(compiled, X) < outside / 2
        assert kept(nnx.jit(block), X) < outside / 2
    assert kept(compiled, X) == outside


def test_other_threads_see_the_functions_of_nnx():
    before, found = namespaces(), {}
    inside, done = threading.Barrier(3), threading.Barrier(3)

    def outside(name):
        inside.wait()
        found[name] = kept(block, X)
        done.wait()

    def leaves_first(name):
        with fcg.functions():
            inside.wait()
            found[name] = kept(block, X)
        done.wait()

    threads = [
        threading.Thread(target=target, args=(target.__name__,))
        for target in (outside, leaves_first)
    ]
    for thread in threads:
        thread.start()
    with fcg.functions():
        inside.wait()
        found["main"] = kept(block, X)
        done.wait()
        # The other thread has left: this one is still inside.
        assert kept(block, X) == KEPT_BY_OURS
    for thread in threads:
        thread.join()
    assert found == {
        "outside": KEPT_BY_NNX,
        "leaves_first": KEPT_BY_OURS,
        "main": KEPT_BY_OURS,
    }
    assert_untouched(before)


def test_a_model_that_is_made_inside_holds_functions_that_can_be_converted():
    with fcg.functions():
        model = nnx.Sequential(nnx.gelu, functools.partial(nnx.leaky_relu, negative_slope=0.1))
    assert kept(model.layers[0], X) == kept(nnx.gelu, X)
    fcg.convert(model)
    assert model.layers[0] is fcg.gelu
    assert model.layers[1].func is fcg.leaky_relu
    fcg.revert(model)
    assert model.layers[0] is nnx.gelu
    assert model.layers[1].func is nnx.leaky_relu


# Models as users write them


class Attention(nnx.Module):
    def __init__(self, width, heads, *, rngs):
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x).reshape(*x.shape[:2], self.heads, -1), 3, -1)
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1])
        mask = jnp.tri(x.shape[1], dtype=bool)
        weights = jax.nn.softmax(scores, where=mask)
        return self.out(jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(x.shape))


class MLP(nnx.Module):
    def __init__(self, width, act=nnx.gelu, *, rngs):
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)
        self.act = act

    def __call__(self, x):
        return self.down(self.act(self.up(x)))


class Transformer(nnx.Module):
    """A decoder: its activation is held, its softmax and log_softmax are called by name."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(8, rngs=rngs) for _ in range(2)])
        self.attention = Attention(8, 2, rngs=rngs)
        self.mlp = MLP(8, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return nnx.log_softmax(self.embed.attend(x))


class ConvNet(nnx.Module):
    """Its activations and poolings are called by name."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), strides=(2, 2))
        return nnx.log_softmax(self.head(nnx.silu(x.mean((1, 2)))))


def sequential(rngs):
    """Everything is held."""
    return nnx.Sequential(
        nnx.Linear(4, 8, rngs=rngs),
        functools.partial(nnx.gelu, approximate=False),
        nnx.Sequential(nnx.LayerNorm(8, rngs=rngs), nnx.silu),
        nnx.softmax,
    )


@jax.jit
def logits_and_gradient(graph, params, rest, x):
    def loss(params):
        model = nnx.merge(graph, params, rest, copy=True)
        out = model(x)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    gradient, out = jax.grad(loss, has_aux=True)(params)
    return out, gradient


logits_and_gradient = jax.jit(logits_and_gradient.__wrapped__, static_argnums=0)


@pytest.mark.parametrize(
    ("make", "x", "share"),
    [
        (Transformer, jnp.arange(12).reshape(2, 6) % 11, 0.7),
        (ConvNet, jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), 0.6),
        (sequential, X, 0.5),
    ],
    ids=["transformer", "convolutions", "sequential"],
)
def test_models_compute_the_same_and_keep_less(make, x, share):
    model = make(nnx.Rngs(0))
    before, graphdef = namespaces(), nnx.graphdef(model)
    expected = logits_and_gradient(*nnx.split(model, nnx.Param, ...), x)
    report = fcg.conversion(model, x)
    fcg.convert(model)
    with fcg.functions():
        got = logits_and_gradient(*nnx.split(model, nnx.Param, ...), x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    nbytes = report.kept_bytes
    assert nbytes["converted, inside fcg.functions()"] < share * nbytes["flax.nnx"]
    assert nbytes["as it is"] == nbytes["flax.nnx"]
    assert fcg.conversion(model, x).kept_bytes == {**nbytes, "as it is": nbytes["converted"]}
    if make is not sequential:  # A partial is equal to itself alone.
        assert nnx.graphdef(fcg.revert(model)) == graphdef
    assert_untouched(before)
