"""What a function writes to the Variables that it is handed reaches the caller."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_customgrad as fcg


class Counter(nnx.Module):
    def __init__(self):
        self.calls = nnx.BatchStat(jnp.zeros(()))


def count(counted, x):
    variable = counted if isinstance(counted, nnx.Variable) else counted["calls"]
    variable[...] += 1
    return 2 * x


counting = fcg.custom_vjp(count)
counting.defvjp(lambda c, x: (counting(c, x), None), lambda res, g: (None, 2 * g))

HOLDERS = {
    "Variable": lambda v: v,
    "State": lambda v: nnx.State({"calls": v}),
    "dict": lambda v: {"calls": v},
}


def scan(variable, call):
    """The gradient of a scan over calls, which carries the Variable."""

    def loss(x, value):
        def body(carry, _):
            total, value = carry
            held = nnx.BatchStat(value)
            return (total + call(held, x), held[...]), None

        return jax.lax.scan(body, (0.0, value), None, 2)[0]

    grad, variable[...] = jax.grad(loss, has_aux=True)(1.0, variable[...])
    return grad / 2


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize(
    ("calls", "run"),
    [
        (2, lambda v, call: call(v, 1.0) + call(v, 1.0) - 2),
        (1, lambda v, call: nnx.grad(lambda x, v: call(v, x))(1.0, v)),
        (1, lambda v, call: nnx.jit(nnx.grad(lambda x, v: call(v, x)))(1.0, v)),
        (1, lambda v, call: nnx.grad(lambda x, v: call(v, x), graph_updates=False)(1.0, v)),
        (1, lambda v, call: nnx.remat(lambda v, x: call(v, x))(v, 1.0)),
        (2, scan),
    ],
    ids=["eager", "grad", "jit", "graph_updates=False", "remat", "scan"],
)
def test_a_variable_that_is_written_reaches_the_caller(calls, run, hold):
    variable = nnx.BatchStat(jnp.zeros(()))
    assert run(variable, lambda v, x: counting(hold(v), x)) == 2
    assert variable[...] == calls


def test_one_variable_is_not_written_through_two_arguments():
    def both(a, b):
        a[...] += 1
        b[...] += 1
        return a[...]

    op = fcg.custom_vjp(both)
    op.defvjp(lambda a, b: (op(a, b), None), lambda res, g: (None, None))
    variable = nnx.BatchStat(jnp.zeros(()))
    with pytest.raises(TypeError, match=r"`both` is given one Variable in two of its arguments"):
        op(variable, variable)
    assert op(variable, nnx.BatchStat(jnp.zeros(()))) == 1


def redraw(x, rngs):
    return x * jax.random.bernoulli(rngs(), 0.5, x.shape)


class Dropping(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("stream", "draw", "where"),
    [
        (lambda: nnx.Rngs(0), redraw, "default.count of a Rngs"),
        (lambda: nnx.Rngs(0)["default"], redraw, "count of a RngStream"),
        (Dropping, lambda x, m: m.dropout(x), "dropout.rngs.count of a Dropping"),
    ],
)
def test_a_mask_that_a_backward_draws_anew_is_another(stream, draw, where, jit):
    op = fcg.custom_vjp(draw)
    op.defvjp(lambda x, r: (draw(x, r), r), lambda r, g: (draw(g, r), None))
    with pytest.raises(TypeError) as caught:
        jit(nnx.grad(lambda x, r: op(x, r).sum()))(jnp.ones(4), stream())
    assert f"draws from the random stream of {where} again, and gets other" in str(caught.value)
    assert "let fwd keep what it drew, the mask or the key, in the residuals" in str(caught.value)


def test_a_mask_or_a_key_is_kept():
    def fwd(x, rngs):
        key = rngs()
        return x * jax.random.bernoulli(key, 0.5, x.shape), key

    op = fcg.custom_vjp(redraw)
    op.defvjp(fwd, lambda key, g: (g * jax.random.bernoulli(key, 0.5, g.shape), None))
    x = jnp.arange(1.0, 9.0)
    got, expected = (
        nnx.grad(lambda x, r, f=f: f(x, r).sum())(x, nnx.Rngs(3)) for f in (op, redraw)
    )
    assert jnp.array_equal(got, expected)


def test_a_backward_that_writes_a_bare_variable_is_refused():
    op = fcg.custom_vjp(lambda v, x: x)
    op.defvjp(lambda v, x: (x, v), lambda v, g: (v.set_value(g), g))
    with pytest.raises(TypeError, match="writes to a BatchStat, and the write would be lost"):
        jax.grad(lambda x: op(nnx.BatchStat(jnp.zeros(())), x))(1.0)
