"""A closure over what is differentiated is refused by name; over anything else it works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

X = jnp.arange(6.0).reshape(2, 3)
NAMED = r"of .* closes over `m`, a Linear of .* make `m` an argument"


def with_rules(fun, fwd, bwd):
    op = fcg.custom_vjp(fun)
    op.defvjp(fwd, bwd)
    return op


def in_the_function(m, x):
    def fun(x):
        return x @ m.kernel

    return with_rules(fun, lambda x: (fun(x), None), lambda _, g: (g @ m.kernel.T,))(x)


def in_the_forward(m, x):
    return with_rules(
        lambda x: 2 * x, lambda x: (2 * x, m.kernel), lambda k, g: (2 * g + 0 * k.sum(),)
    )(x)


def in_the_backward(m, x):
    return with_rules(
        lambda x: 2 * x, lambda x: (2 * x, None), lambda _, g: (2 * g + 0 * m.kernel.sum(),)
    )(x)


TRANSFORMS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda f: lambda x: jax.vmap(f)(x[:, None]).sum(),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (c + f(x), None), 0.0, None, 1)[0],
}


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["", "outer jit"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("f", [in_the_function, in_the_forward, in_the_backward])
def test_a_differentiated_module_in_a_closure_is_named(f, transform, outer):
    graphdef, state = nnx.split(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))

    def loss(state, x):
        return transform(lambda x: f(nnx.merge(graphdef, state), x).sum())(x)

    with pytest.raises(TypeError, match=NAMED):
        outer(jax.grad(loss, argnums=(0, 1)))(state, X)
    # Where the argument alone is differentiated, the closure holds constants.
    if transform not in (jax.jit, TRANSFORMS["scan"]) or outer is not jax.jit:
        assert np.any(outer(jax.grad(loss, argnums=1))(state, X))


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint])
@pytest.mark.parametrize("f", [in_the_forward, in_the_backward])
def test_an_argument_of_a_compiled_function_in_a_closure_is_named(f, transform):
    graphdef, state = nnx.split(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    loss = transform(lambda state, x: f(nnx.merge(graphdef, state), x).sum())
    with pytest.raises(TypeError, match=NAMED):
        jax.grad(loss, argnums=(0, 1))(state, X)


def test_settings_are_read_from_a_differentiated_module():
    def scaled(m, x):
        fun = lambda w, x: x @ w / m.in_features  # noqa: E731
        op = with_rules(
            fun,
            lambda w, x: (fun(w, x), (w, x)),
            lambda res, g: (res[1].T @ g / m.in_features, g @ res[0].T / m.in_features),
        )
        return jnp.sin(op(m.kernel[...], x)).sum()

    m = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    got = nnx.grad(scaled)(m, X)
    expected = nnx.grad(lambda m, x: jnp.sin(x @ m.kernel / 3).sum())(m, X)
    np.testing.assert_allclose(got.kernel[...], expected.kernel[...], rtol=1e-5)


@pytest.mark.parametrize("name", ["eager", "remat", "vmap"])
def test_a_closure_may_hold_what_an_outer_derivative_differentiates(name):
    def inner(w, product):
        return jax.grad(TRANSFORMS[name](lambda x: jnp.sin(product(w)(x)).sum()))(X)

    def ours(w):
        return with_rules(lambda x: x @ w, lambda x: (x @ w, None), lambda _, g: (g @ w.T,))

    def plain(w):
        return lambda x: x @ w

    w = jnp.arange(6.0).reshape(3, 2) / 10
    got, expected = (jax.grad(lambda w, p=p: inner(w, p).sum())(w) for p in (ours, plain))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_bound_method_closes_over_its_module():
    class Scale(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.full(3, 2.0))

        def scale(self, x):
            return x * self.w

    def loss(m, x):
        op = with_rules(m.scale, lambda x: (m.scale(x), None), lambda _, g: (g * m.w,))
        return op(x).sum()

    np.testing.assert_array_equal(nnx.grad(loss, argnums=1)(Scale(), X), 2)
    with pytest.raises(TypeError, match=r"`Scale.scale` closes over `self`, a Scale"):
        nnx.grad(loss)(Scale(), X)


def closure_of(x):
    return lambda g: g * jnp.cos(x)


def object_of(x):
    class Cosine:
        def __init__(self):
            self.x = x

        def __call__(self, g):
            return g * jnp.cos(self.x)

    return Cosine()


@pytest.mark.parametrize("transform", ["jit", "remat", "scan"])
@pytest.mark.parametrize(("residual", "kind"), [(closure_of, "function"), (object_of, "Cosine")])
def test_a_residual_that_is_static_holds_no_array(residual, kind, transform):
    op = with_rules(jnp.sin, lambda x: (jnp.sin(x), residual(x)), lambda pull, g: (pull(g),))
    x = jnp.float32(1)
    np.testing.assert_allclose(jax.grad(op)(x), jnp.cos(x), rtol=1e-6)
    with pytest.raises(TypeError, match=f"hold a {kind} that holds an array of the forward, which"):
        jax.grad(TRANSFORMS[transform](op))(x)
    partial = with_rules(
        jnp.sin,
        lambda x: (jnp.sin(x), jax.tree_util.Partial(lambda x, g: g * jnp.cos(x), x)),
        lambda pull, g: (pull(g),),
    )
    np.testing.assert_allclose(jax.grad(TRANSFORMS[transform](partial))(x), jnp.cos(x), rtol=1e-6)


def test_anything_may_be_closed_over():
    class Node:
        pass

    node, names = Node(), {1: "one", "two": 2}
    node.itself, node.names = node, names
    op = with_rules(
        lambda x: x * names["two"],
        lambda x: (x * node.itself.names["two"], jnp),
        lambda numpy, g: (3 * g * numpy.ones(()) * len(names),),
    )
    assert jax.grad(lambda x: op(x).sum())(1.0) == 6
    assert jax.jit(jax.grad(lambda x: op(x).sum()))(1.0) == 6
