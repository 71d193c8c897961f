"""What `jax.custom_vjp` does, `custom_vjp` does, but for differences that are written down here.

Differences: numbers of Python and hashable values are static, so there is no `nondiff_argnums`;
None is a cotangent of zero for any argument, an integer one too; fwd is compared with the function.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_customgrad as fcg


def both(fun, fwd, bwd, **kwargs):
    """The function as an operation of ours, and of JAX."""
    ours, theirs = fcg.custom_vjp(fun), jax.custom_vjp(fun, **kwargs)
    for op in (ours, theirs):
        op.defvjp(fwd, bwd)
    return ours, theirs


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-6)


# A rule that is not the derivative shows that it is what is used.
SINE = both(jnp.sin, lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, g: (2 * cos * g,))
X = jnp.float32(3.0)
MANY = jnp.arange(3.0)

TRANSFORMS = {
    "value": lambda f: f(X),
    "grad": lambda f: jax.grad(f)(X),
    "value_and_grad": lambda f: jax.value_and_grad(f)(X),
    "grad twice": lambda f: jax.grad(jax.grad(f))(X),
    "jit": lambda f: jax.jit(f)(X),
    "jit of grad": lambda f: jax.jit(jax.grad(f))(X),
    "grad of jit": lambda f: jax.grad(jax.jit(f))(X),
    "vmap": lambda f: jax.vmap(f)(MANY),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(MANY),
    "grad of vmap": lambda f: jax.grad(lambda x: jax.vmap(f)(x).sum())(MANY),
    "vmap of vmap": lambda f: jax.vmap(jax.vmap(jax.grad(f)))(MANY[None]),
    "jacrev": lambda f: jax.jacrev(f)(MANY),
    "vjp": lambda f: jax.vjp(f, X)[1](jnp.float32(4.0)),
    "remat": lambda f: jax.grad(jax.checkpoint(f))(X),
    "grad of remat twice": lambda f: jax.grad(jax.grad(jax.checkpoint(f)))(X),
    "remat with a policy": lambda f: jax.grad(
        jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable)
    )(X),
    "scan": lambda f: jax.grad(lambda x: jax.lax.scan(lambda c, _: (f(c), c), x, None, 3)[0])(X),
    "scan over inputs": lambda f: jax.grad(
        lambda xs: jax.lax.scan(lambda c, x: (c + f(x), None), 0.0, xs)[0]
    )(MANY),
    "while": lambda f: jax.lax.while_loop(lambda c: c > 1, f, X),
    "fori": lambda f: jax.grad(lambda x: jax.lax.fori_loop(0, 3, lambda i, c: f(c), x))(X),
    "cond": lambda f: jax.grad(lambda x: jax.lax.cond(x > 0, f, lambda x: x, x))(X),
    "switch": lambda f: jax.grad(lambda x: jax.lax.switch(1, [jnp.cos, f], x))(X),
    "map": lambda f: jax.lax.map(jax.grad(f), MANY),
    "eval_shape": lambda f: jnp.zeros(jax.eval_shape(f, X).shape),
    "linear_transpose": lambda f: jax.linear_transpose(jax.vjp(f, X)[1], X)((X,)),
    "composed": lambda f: jax.grad(lambda x: f(2 * f(x)) + f(x))(X),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform):
    ours, theirs = map(transform, SINE)
    assert_same(ours, theirs)


Point = collections.namedtuple("Point", "x y")


def weighted(point, scale):
    return {"out": jnp.sin(point.x) * scale, "parts": (point.y, None)}


def weighted_fwd(point, scale):
    return weighted(point, scale), (point, scale)


def weighted_bwd(res, g):
    point, scale = res
    d = Point(2 * g["out"] * scale * jnp.cos(point.x), 3 * g["parts"][0])
    return d, g["out"] * jnp.sin(point.x)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_trees_for_arguments_outputs_and_residuals(jit):
    def loss(op):
        def of(point, scale):
            out = op(point, scale)
            return out["out"] + jnp.square(out["parts"][0])

        return of

    args = Point(jnp.float32(2.0), jnp.float32(3.0)), jnp.float32(4.0)
    ours, theirs = (
        jit(jax.grad(loss(op), argnums=(0, 1)))(*args)
        for op in both(weighted, weighted_fwd, weighted_bwd)
    )
    assert_same(ours, theirs)
    # A part of the output that is not used has a cotangent of zeros.
    ours, theirs = (
        jit(jax.grad(lambda p, op=op: op(p, args[1])["out"]))(args[0])
        for op in both(weighted, weighted_fwd, weighted_bwd)
    )
    assert_same(ours, theirs)


def test_keywords_and_defaults():
    def fun(x, y=2.0, scale=3.0):
        return x * y * scale

    op = fcg.custom_vjp(fun)
    op.defvjp(lambda x, y, scale: (fun(x, y, scale), None), lambda _, g: (7 * g, None, None))
    assert op(X) == fun(X)
    for f in (op, lambda x: op(x, scale=1.0), lambda x: op(y=2.0, x=x), lambda x: op(x, 5.0)):
        assert jax.grad(f)(X) == 7


def test_integers_and_float0():
    def fun(x, i):
        return x[i], i + 1

    def fwd(x, i):
        return fun(x, i), (x.shape, i)

    def bwd(zero, res, g):
        shape, i = res
        assert g[1].dtype == jax.dtypes.float0
        return jnp.zeros(shape).at[i].add(2 * g[0]), zero(i)

    x, i = jnp.arange(3.0), jnp.array([0, 0, 2])
    for zero in (lambda i: None, lambda i: np.zeros(i.shape, jax.dtypes.float0)):
        ours, theirs = both(fun, fwd, functools.partial(bwd, zero))
        got, expected = (
            jax.grad(lambda x, i, op=op: op(x, i)[0].sum(), argnums=(0, 1), allow_int=True)(x, i)
            for op in (ours, theirs)
        )
        assert_same(got, expected)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_hashable_argument_takes_the_place_of_nondiff_argnums(jit):
    def apply(f, x):
        return f(x)

    ours = fcg.custom_vjp(apply)
    ours.defvjp(lambda f, x: (apply(f, x), (f, x)), lambda res, g: (None, 2 * g * res[0](res[1])))
    theirs = jax.custom_vjp(apply, nondiff_argnums=(0,))
    theirs.defvjp(lambda f, x: (apply(f, x), x), lambda f, x, g: (2 * g * f(x),))
    got, expected = (
        jit(jax.grad(lambda x, op=op: op(jnp.cos, op(jnp.sin, x))))(X) for op in (ours, theirs)
    )
    assert_same(got, expected)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_closed_over_values_of_a_trace_that_are_not_differentiated(jit):
    def of(make):
        def outer(x, y):
            op = make(lambda x: x * y)
            op.defvjp(lambda x: (x * y, None), lambda _, g: (3 * g * y,))
            return op(x)

        return jit(jax.grad(outer))(X, jnp.float32(5.0))

    assert_same(of(fcg.custom_vjp), of(jax.custom_vjp))


def test_operations_in_the_rules_of_operations():
    def product(sine):
        return both(
            lambda x: sine(x) * x,
            lambda x: (sine(x) * x, x),
            lambda x, g: (g * (jax.grad(sine)(x) * x + sine(x)),),
        )

    ours, theirs = product(SINE[0])[0], product(SINE[1])[1]
    for transform in (jax.grad, lambda f: jax.grad(jax.grad(f)), lambda f: jax.jit(jax.grad(f))):
        assert_same(transform(ours)(X), transform(theirs)(X))


def test_zero_sized_and_complex_arrays():
    square = both(lambda z: z * z, lambda z: (z * z, z), lambda z, g: (2 * z * g,))
    for z in (jnp.zeros((0, 2)), jnp.array([1 + 2j, 3j])):
        got, expected = (jax.grad(lambda z, op=op: jnp.abs(op(z)).sum())(z) for op in square)
        assert_same(got, expected)


def test_keys():
    def noisy(x, key):
        return x * jax.random.normal(key, x.shape), jax.random.split(key)[0]

    ops = both(noisy, lambda x, k: (noisy(x, k), k), lambda k, g: (noisy(3 * g[0], k)[0], None))
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        got, expected = (
            jax.grad(lambda x, op=op, k=key: op(op(x, k)[0], op(x, k)[1])[0].sum())(MANY)
            for op in ops
        )
        assert_same(got, expected)


WRONG = {
    "no rules": (None, None, "has no backward yet"),
    "fwd returns no pair": (lambda x: x, lambda r, g: (g,), "expected a pair"),
    "fwd returns three": (lambda x: (x, x, x), lambda r, g: (g,), "expected a pair"),
    "fwd returns another structure": (lambda x: ((x, x), None), lambda r, g: (g,), "the function"),
    "fwd returns another shape": (lambda x: (x[None], None), lambda r, g: (g,), "the function"),
    "fwd returns another dtype": (
        lambda x: (x.astype(jnp.bfloat16), None),
        lambda r, g: (g,),
        "the function returns",
    ),
    "bwd returns no tuple": (lambda x: (x, None), lambda r, g: g, "expected a tuple with one"),
    "bwd returns too many": (lambda x: (x, None), lambda r, g: (g, g), "expected length 1"),
    "bwd returns a structure": (lambda x: (x, None), lambda r, g: ((g,),), "the array itself"),
    "bwd returns another shape": (lambda x: (x, None), lambda r, g: (g[None],), "the shape of"),
    "bwd returns another dtype": (
        lambda x: (x, None),
        lambda r, g: (g.astype(jnp.bfloat16),),
        "cannot hold every float32",
    ),
}


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(("fwd", "bwd", "told"), WRONG.values(), ids=WRONG)
def test_wrong_rules(fwd, bwd, told, jit):
    op = fcg.custom_vjp(lambda x: x)
    if fwd is not None:
        op.defvjp(fwd, bwd)
    with pytest.raises((TypeError, fcg.CotangentError), match=told):
        jit(jax.grad(lambda x: jnp.sum(jax.tree.leaves(op(x))[0])))(X)


def test_the_name_and_the_documentation_are_those_of_the_function():
    def f(x):
        """Returns it."""
        return x

    op = fcg.custom_vjp(f)
    assert (op.__name__, op.__doc__, op.__wrapped__) == ("f", "Returns it.", f)
