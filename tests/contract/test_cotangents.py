"""What a wrong backward is told. The words are part of the product, so they are tested."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_customgrad as fcg

KERNEL = "nnx.State({'bias': ..., 'kernel': ...})"


@pytest.fixture
def told():
    """Runs a backward of `linear(m, x)` and returns what its author is told."""
    m = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((5, 3))

    def run(bwd, m=m, x=x):
        @fcg.custom_vjp
        def linear(m, x):
            return (x @ m.kernel[...] + m.bias[...]).astype(jnp.float32)

        linear.defvjp(lambda m, x: (linear(m, x), (m, x)), bwd)
        with pytest.raises(fcg.CotangentError) as caught:
            nnx.grad(lambda m, x: linear(m, x).sum(), argnums=(0, 1))(m, x)
        return str(caught.value)

    return run


def right(res, g):
    m, x = res
    return {"kernel": x.T @ g, "bias": g.sum(0)}, g @ m.kernel.T


@pytest.mark.smoke
def test_a_wrong_shape(told):
    def transposed(res, g):
        grads, dx = right(res, g)
        return nnx.State({**grads, "kernel": grads["kernel"].T}), dx

    assert told(transposed) == (
        "the cotangent of argument `m: Linear` of `linear`, path 'kernel', is float32[2,3]; "
        "expected float32[3,2], the shape of what it belongs to. It is transposed: swap the "
        "operands of the product"
    )


def test_a_forgotten_sum_over_the_batch(told):
    def unsummed(res, g):
        grads, dx = right(res, g)
        return nnx.State({**grads, "bias": g}), dx

    message = told(unsummed)
    assert "path 'bias', is float32[5,2]; expected float32[2]" in message
    assert "sum over the leading axes, .sum(axis=(0,))" in message


def test_a_wrong_shape_for_an_array(told):
    message = told(lambda res, g: (nnx.State(right(res, g)[0]), g))
    assert message.startswith(
        "the cotangent of argument `x` of `linear` is float32[5,2]; expected float32[5,3]"
    )


def test_zero_for_an_array_is_none(told):
    message = told(lambda res, g: (nnx.State(right(res, g)[0]), 0.0))
    assert message.endswith(
        "float32[5,3], the shape of what it belongs to. A gradient of zero is None"
    )


@pytest.mark.smoke
def test_a_missing_parameter(told):
    message = told(lambda res, g: (nnx.State({"kernel": right(res, g)[0]["kernel"]}), None))
    assert message == (
        "the cotangent of argument `m: Linear` of `linear` misses the parameter 'bias', "
        f"float32[2]: write {KERNEL}, with None for a parameter that has no gradient"
    )


def test_an_unknown_parameter(told):
    def misspelt(res, g):
        grads, dx = right(res, g)
        return nnx.State({"kernal": grads["kernel"], "bias": grads["bias"]}), dx

    assert told(misspelt) == (
        "the cotangent of argument `m: Linear` of `linear` names an unknown parameter 'kernal' "
        f"(did you mean 'kernel'?): write {KERNEL}"
    )


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (lambda grads: grads["kernel"], "float32[3,2]"),
        (lambda grads: (grads["kernel"], grads["bias"]), "a tuple (float32[3,2], float32[2])"),
        (lambda grads: nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "a module Linear"),
    ],
    ids=["array", "tuple", "module"],
)
def test_a_wrong_structure(told, wrong, came):
    message = told(lambda res, g: (wrong(right(res, g)[0]), right(res, g)[1]))
    assert message == (
        f"the cotangent of argument `m: Linear` of `linear` is {came}; expected an nnx.State "
        f"keyed like its parameters: write {KERNEL}"
    )


def test_a_wrong_nesting(told):
    message = told(lambda res, g: (nnx.State({"linear": right(res, g)[0]}), None))
    assert "names an unknown parameter 'linear.kernel' (did you mean 'kernel'?)" in message
    assert KERNEL in message


@pytest.mark.parametrize("narrow", ["bfloat16", "float16"])
def test_a_narrower_dtype(told, narrow):
    def bwd(res, g):
        grads, dx = right(res, g)
        return nnx.State({**grads, "kernel": grads["kernel"].astype(narrow)}), dx

    message = told(bwd)
    assert f"path 'kernel', is {narrow}[3,2]; expected float32[3,2] or a wider dtype" in message
    assert "preferred_element_type=jnp.float32" in message


def test_neither_half_precision_holds_the_other(told):
    m = nnx.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    def bwd(res, g):
        return nnx.State({k: v.astype(jnp.float16) for k, v in right(res, g)[0].items()}), None

    assert "float16 cannot hold every bfloat16" in told(bwd, m=m)


def test_a_complex_cotangent_of_a_real_array(told):
    message = told(lambda res, g: (None, right(res, g)[1] + 0j))
    assert "is complex64[5,3]; expected float32[5,3]" in message


@pytest.mark.parametrize("n", [1, 3])
def test_a_tuple_of_the_wrong_length(told, n):
    message = told(lambda res, g: (nnx.State(right(res, g)[0]), *(None,) * (n - 1)))
    assert message == (
        f"the backward of `linear` returned a tuple of length {n}; expected length 2, one "
        "cotangent per argument (m: Linear, x). Write None for an argument that has no gradient"
    )


def test_no_tuple(told):
    message = told(lambda res, g: nnx.State(right(res, g)[0]))
    assert message == (
        "the backward of `linear` returned nnx.State({'kernel': float32[3,2], 'bias': "
        "float32[2]}); expected a tuple with one cotangent per argument (m: Linear, x)"
    )


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_article_form(told, rows):
    """`nnx.State((x_grad,))` fails inside flax, in a different way for each number of rows."""

    def article(res, g):
        grads, x_grad = right(res, g)
        return nnx.State(grads), nnx.State((x_grad,))

    message = told(article, x=jnp.ones((rows, 3)))
    assert message == (
        f"the backward of `linear` built nnx.State((float32[{rows},3],)): a State maps names to "
        "cotangents, and an array has no names. The cotangent of an array is the array itself: "
        "write `x_grad` for an array, and nnx.State({'kernel': kernel_grad, ...}) for a Module"
    )


def test_a_state_for_an_array(told):
    message = told(lambda res, g: (None, nnx.State({"x": right(res, g)[1]})))
    assert message == (
        "the cotangent of argument `x` of `linear` is nnx.State({'x': float32[5,3]}); expected "
        "float32[5,3], the array itself. Only a Module, a State or a dict has a State for its "
        "cotangent"
    )


def test_a_string_for_an_array(told):
    assert "is 'none', a str; expected float32[5,3]" in told(lambda res, g: (None, "none"))


def fails(fun, bwd, *args, diff=0):
    op = fcg.custom_vjp(fun)
    op.defvjp(lambda *args: (fun(*args), args), bwd)
    with pytest.raises(fcg.CotangentError) as caught:
        jax.grad(lambda *args: op(*args).sum(), argnums=diff)(*args)
    return str(caught.value)


def test_a_cotangent_for_integers_or_static_values():
    x, ids = jnp.ones(3), jnp.arange(3)
    message = fails(lambda x, ids: x * ids, lambda res, g: (g, g), x, ids)
    assert "argument `ids` of `<lambda>` is float32[3], but int32[3] has no gradient" in message

    def power(x, n):
        return x**n

    op = fcg.custom_vjp(power)
    op.defvjp(lambda x, n: (power(x, n), x), lambda x, g: (g, g))
    with pytest.raises(fcg.CotangentError, match="static value 2, which has no gradient: write"):
        jax.grad(lambda x: op(x, 2).sum())(x)


def test_a_wrong_item_of_a_tree():
    pair = (jnp.ones(3), {"b": jnp.ones(2)})
    message = fails(lambda p: p[0].sum() + p[1]["b"].sum(), lambda res, g: ((g, None),), pair)
    assert "argument `p` of `<lambda>`, item 0, is float32[]; expected float32[3]" in message
    message = fails(
        lambda p: p[0].sum() + p[1]["b"].sum(), lambda res, g: ((None, res[0][0]),), pair
    )
    assert "item 1, is float32[3]; expected an nnx.State keyed like its parameters" in message
    message = fails(lambda p: p[0].sum() + p[1]["b"].sum(), lambda res, g: ((None,),), pair)
    assert message.endswith(
        "is a tuple (None); expected the structure of the argument, a tuple "
        "(float32[3], dict({'b': float32[2]}))"
    )


def test_other_errors_of_a_backward_pass_through(told):
    def broken(res, g):
        raise ZeroDivisionError("mine")

    op = fcg.custom_vjp(lambda x: x)
    op.defvjp(lambda x: (x, None), broken)
    with pytest.raises(ZeroDivisionError, match="mine"):
        jax.grad(lambda x: op(x).sum())(jnp.ones(2))


def test_checks_leave_nothing_in_the_program():
    def fun(params, x):
        return x @ params["kernel"]

    def bwd(res, g):
        params, x = res
        return nnx.State({"kernel": x.T @ g}), g @ params["kernel"].T

    checked = fcg.custom_vjp(fun)
    bare = jax.custom_vjp(fun)
    for op in (checked, bare):
        op.defvjp(lambda params, x: (fun(params, x), (params, x)), bwd)
    params, x = nnx.State({"kernel": jnp.ones((3, 2))}), jnp.ones((5, 3))
    programs = [
        jax.jit(jax.grad(lambda p, op=op: op(p, x).sum())).lower(params).compile().as_text()
        for op in (checked, bare)
    ]
    counts = [text.count(" = ") for text in programs]
    assert counts[0] == counts[1]


def test_float32_for_float64_is_a_loss_that_a_user_takes_and_the_library_means():
    """A layer that computes in float32 casts a float64 kernel, and its backward casts back."""

    @fcg.custom_vjp
    def double(x):
        return 2 * x.astype(jnp.float32)

    double.defvjp(lambda x: (double(x), None), lambda res, g: (2 * g,))
    with jax.enable_x64(True):
        with pytest.raises(fcg.CotangentError, match=r"is float32\[3\]; expected float64\[3\]"):
            jax.grad(lambda x: double(x).sum())(jnp.ones(3, jnp.float64))
        layer = fcg.Linear(3, 2, dtype=jnp.float32, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        grads = nnx.grad(lambda layer: layer(jnp.ones((5, 3), jnp.float64)).sum())(layer)
        assert grads.kernel.dtype == grads.bias.dtype == jnp.float64
