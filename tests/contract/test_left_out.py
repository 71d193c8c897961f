"""What a backward leaves out is zero; where it is differentiated, it is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


class Scale(nnx.Variable):
    """Trained, and no nnx.Param."""


class Normalize(nnx.Module):
    """Scales, and subtracts a running mean; keeps a statistic that it does not read."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.arange(1.0, 4.0))
        self.scale = Scale(jnp.full(3, 2.0))
        self.mean = nnx.BatchStat(jnp.ones(3))
        self.amax = nnx.BatchStat(jnp.ones(3))


def fun(m, x):
    m.amax[...] = jnp.maximum(m.amax[...], x.max(0))
    return (x - m.mean) * m.kernel * jnp.where(m.scale[...] > 0, m.scale[...], 0.0)


def make(*names):
    def bwd(res, g):
        m, x = res
        h = g * (x - m.mean)
        grads = {
            "kernel": (h * m.scale).sum(0),
            "scale": (h * m.kernel).sum(0),
            "mean": -(g * m.kernel * m.scale).sum(0),
        }
        return {name: grads[name] for name in names}, g * m.kernel * m.scale

    op = fcg.custom_vjp(fun)
    op.defvjp(lambda m, x: (op(m, x), (m, x)), bwd)
    return op


X = jnp.arange(6.0).reshape(2, 3)


def loss(op):
    return lambda m: jnp.sin(op(m, X)).sum()


def of_states(transform):
    """The gradient by the Variables of some kinds, after a transform of the loss by State."""

    def gradient(op, m, *kinds):
        graphdef, wanted, rest = nnx.split(m, kinds, ...)
        of = transform(lambda s: loss(op)(nnx.merge(graphdef, s, rest, copy=True)))
        return jax.grad(of)(wanted)

    return gradient


TRANSFORMS = {
    "nnx": lambda op, m, *kinds: nnx.state(
        nnx.grad(loss(op), argnums=nnx.DiffState(0, kinds))(m), kinds
    ),
    "nnx.jit": lambda op, m, *kinds: nnx.state(
        nnx.jit(nnx.grad(loss(op), argnums=nnx.DiffState(0, kinds)))(m), kinds
    ),
    "eager": of_states(lambda f: f),
    "jit": of_states(jax.jit),
    "remat": of_states(jax.checkpoint),
    "vmap": of_states(lambda f: lambda s: jax.vmap(lambda _: f(s))(X).sum()),
    "scan": of_states(
        lambda f: lambda s: jax.lax.scan(lambda c, _: (c + f(s), None), 0.0, None, 2)[0]
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_is_differentiated_and_left_out_is_named(transform):
    some, all_of_them = make("kernel"), make("kernel", "scale", "mean")
    # Not differentiated: it needs no mention.
    got = transform(some, Normalize(), nnx.Param)
    expected = transform(fun, Normalize(), nnx.Param)
    np.testing.assert_allclose(got["kernel"][...], expected["kernel"][...], rtol=1e-5)
    # Differentiated.
    with pytest.raises(fcg.CotangentError) as caught:
        transform(some, Normalize(), nnx.Param, Scale)
    assert str(caught.value) == (
        "the cotangent of argument `m: Normalize` of `fun` misses the parameter 'scale', "
        "float32[3], which is differentiated and on which the output depends: write "
        "nnx.State({'kernel': ..., 'scale': ...}), with None for a parameter that has no gradient"
    )
    # The statistic that is written alone is differentiated too, and needs no mention.
    got = transform(all_of_them, Normalize(), nnx.Param, Scale, nnx.BatchStat)
    expected = transform(fun, Normalize(), nnx.Param, Scale, nnx.BatchStat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def test_the_whole_of_a_module_may_be_differentiated():
    graph = {"graph": False, "graph_updates": False}
    grads = nnx.grad(loss(make("kernel", "scale", "mean")), **graph)(Normalize())
    expected = nnx.grad(loss(fun), **graph)(Normalize())
    np.testing.assert_allclose(grads.scale[...], expected.scale[...], rtol=1e-5)
    with pytest.raises(fcg.CotangentError, match="misses the parameter 'mean'"):
        nnx.grad(loss(make("kernel", "scale")), **graph)(Normalize())


def test_none_is_a_mention():
    op = fcg.custom_vjp(fun)
    names = ("kernel", "scale", "mean")
    op.defvjp(lambda m, x: (op(m, x), None), lambda _, g: (dict.fromkeys(names), None))
    grads = TRANSFORMS["eager"](op, Normalize(), nnx.Param, Scale)
    assert not np.any(grads["scale"][...])


def test_what_is_behind_stop_gradient_or_is_compared_alone_needs_no_mention():
    class Gated(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3))
            self.gate = Scale(jnp.ones(3))
            self.center = Scale(jnp.ones(3))

    def gated(m, x):
        return jnp.where(m.gate[...] > 0, x - jax.lax.stop_gradient(m.center[...]), x) * m.w

    op = fcg.custom_vjp(gated)
    op.defvjp(
        lambda m, x: (gated(m, x), gated(m, x) / m.w), lambda h, g: ({"w": (g * h).sum(0)}, None)
    )
    got = TRANSFORMS["jit"](op, Gated(), nnx.Param, Scale)
    expected = TRANSFORMS["jit"](gated, Gated(), nnx.Param, Scale)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
