"""An error inside a user's function, fwd or bwd: where it was raised, what it means, what to do."""

import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

X = jnp.arange(6.0).reshape(2, 3)


def with_rules(fun, fwd, bwd):
    op = fcg.custom_vjp(fun)
    op.defvjp(fwd, bwd)
    return op


def total(x, axis):
    return jnp.sum(x, axis=axis)


def flipped(x, flip):
    return -x if flip else x


def rows(x, n):
    return jnp.reshape(x, (n, -1))


def repeated(x, n):
    return sum(x for _ in range(n))


def named(x, mode):
    return {0: x, 1: 2 * x}[mode]


STATIC = {"axis": (total, 1), "flip": (flipped, True), "n": (rows, 3), "mode": (named, 1)}


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax", "nnx"])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("argument", STATIC)
def test_a_static_argument_that_is_traced_is_named(argument, gradient, jit):
    fun, value = STATIC[argument]
    op = with_rules(fun, lambda x, s: (fun(x, s), x), lambda x, g: (jnp.ones_like(x), None))

    def run(x, static):
        return op(x, static).sum()

    run = jax.grad(run) if gradient else run
    with pytest.raises(TypeError) as caught:
        jit(run)(X, value)
    kind = "bool" if argument == "flip" else "int32"
    assert f"`{fun.__name__}` needs a value that is known while JAX traces it" in str(caught.value)
    assert f"`{argument}`, {kind}[] is traced. Make it static: where it is" in str(caught.value)
    assert caught.value.__cause__ is not None
    jit(run, static_argnums=1)(X, value)


def test_an_array_for_a_static_argument_is_named_in_a_scan():
    op = with_rules(repeated, lambda x, n: (repeated(x, n), n), lambda n, g: (repeated(g, n), None))

    def body(total, n):
        return total + op(X, n).sum(), None

    with pytest.raises(TypeError, match=r"of its arguments `n`, int32\[\] is traced"):
        jax.lax.scan(body, 0.0, jnp.arange(3))


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_error_keeps_its_line_and_says_in_which_rule_it_was(jit):
    def fwd(x):
        return 2 * x, None

    def broken(*args):
        raise ZeroDivisionError("mine")

    for rules, note in [
        ((fwd, broken), "in the backward of `<lambda>`, where g is float32[2,3]"),
        ((lambda x: broken(x), lambda res, g: (g,)), "in the fwd of `<lambda>`, where x = float32"),
    ]:
        op = with_rules(lambda x: 2 * x, *rules)
        with pytest.raises(ZeroDivisionError, match="mine") as caught:
            jit(jax.grad(lambda x, op=op: op(x).sum()))(X)
        assert any(text.startswith(note) for text in caught.value.__notes__)
        lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert 'raise ZeroDivisionError("mine")' in lines


def test_an_error_that_is_explained_keeps_its_line():
    def article(res, g):
        return (nnx.State((g,)),)

    op = with_rules(lambda x: 2 * x, lambda x: (2 * x, None), article)
    with pytest.raises(fcg.CotangentError) as caught:
        jax.grad(lambda x: op(x).sum())(X)
    printed = "".join(traceback.format_exception(caught.value))
    assert "return (nnx.State((g,)),)" in printed


def test_swapped_rules_are_told():
    op = with_rules(lambda m, x: m * x, lambda res, g: (g * res[1], g * res[0]), lambda m, x: None)
    with pytest.raises(IndexError) as caught:
        jax.grad(op)(jnp.float32(2), X)
    assert "in the fwd of `<lambda>`, where m = float32[]" in "".join(caught.value.__notes__)
    assert "defvjp takes first fwd, then bwd" in "".join(caught.value.__notes__)


def test_a_python_number_may_be_answered_as_an_array_is():
    op = with_rules(
        lambda x, y: x * y, lambda x, y: (x * y, (x, y)), lambda r, g: (g * r[1], (g * r[0]).sum())
    )
    loss = lambda x, y: jnp.sin(op(x, y)).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(lambda x: loss(x, 2.0))(X), 2 * jnp.cos(2 * X), rtol=1e-5)
    expected = jax.grad(lambda y: jnp.sin(X * y).sum())(2.0)
    np.testing.assert_allclose(jax.grad(loss, argnums=1)(X, 2.0), expected, rtol=1e-5)
