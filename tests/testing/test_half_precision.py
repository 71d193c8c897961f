"""check_vjp measures half precision in units in the last place, over thousands of rows."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flax_customgrad as fcg
from flax_customgrad.testing import GradientError, check_vjp

PARAMS = {"kernel": jax.random.normal(jax.random.key(1), (3, 4)), "bias": jnp.linspace(-1, 2, 4)}
X = jax.random.normal(jax.random.key(0), (8, 3))
HALF = ("bfloat16", "float16")


def affine(params, x):
    return x @ params["kernel"] + params["bias"]


def in_float32(res, g):
    params, x = res
    wide = jnp.result_type(g, jnp.float32)
    kernel = jnp.dot(x.T, g, preferred_element_type=wide)
    return {"kernel": kernel, "bias": g.sum(0, dtype=wide)}, g @ params["kernel"].T


def is_half(g):
    return g.dtype.itemsize == 2


def carried(terms):
    """A sum over rows whose every step is rounded to the dtype."""
    return lax.scan(lambda total, term: (total + term, None), jnp.zeros_like(terms[0]), terms)[0]


def too_much(res, g, grads):
    return {**grads, "bias": grads["bias"] * (1.02 if is_half(g) else 1)}


def too_much_in_bfloat16(res, g, grads):
    return {**grads, "kernel": grads["kernel"] * (1.02 if g.dtype == jnp.bfloat16 else 1)}


def carried_sum(res, g, grads):
    return {**grads, "bias": carried(g)} if is_half(g) else grads


def carried_product(res, g, grads):
    return {**grads, "kernel": carried(res[1][:, :, None] * g[:, None])} if is_half(g) else grads


def with_mistake(mistake):
    def bwd(res, g):
        grads, dx = in_float32(res, g)
        return mistake(res, g, grads), dx

    op = fcg.custom_vjp(affine)
    op.defvjp(lambda params, x: (op(params, x), (params, x)), bwd)
    return op


@pytest.mark.parametrize(
    ("mistake", "argument", "dtypes", "only_many_rows"),
    [
        (too_much, "bias", HALF, False),
        (too_much_in_bfloat16, "kernel", HALF[:1], False),
        (carried_sum, "bias", HALF, True),
        (carried_product, "kernel", HALF, True),
    ],
)
def test_a_mistake_in_half_precision_alone_is_caught(mistake, argument, dtypes, only_many_rows):
    report = check_vjp(with_mistake(mistake), PARAMS, X, checks=["dtypes"], raises=False)
    wrong = {(row.case, row.argument) for row in report.failures}
    for dtype in dtypes:
        assert (f"{dtype}, 2048 rows", f"params.{argument}") in wrong
        assert ((dtype, f"params.{argument}") in wrong) is not only_many_rows


def test_a_sum_in_float32_is_off_by_one_rounding_however_many_rows():
    right = with_mistake(lambda res, g, grads: grads)
    report = check_vjp(right, PARAMS, X, checks=["autodiff", "dtypes"])
    many = {row.case: row for row in report.rows if "rows" in row.case}
    assert set(many) == {"bfloat16, 2048 rows", "float16, 2048 rows"}
    for row in many.values():
        assert row.error <= 0.26 * row.tolerance  # which is two units in the last place


def test_what_autodiff_rounds_on_the_way_is_allowed_where_it_is_known():
    """The product is rounded before its sine, which multiplies the error by four."""

    def wave(x, w):
        return jnp.sin(4 * (x * w))

    w = jnp.linspace(0.5, 2.0, 3)
    assert not check_vjp(wave, X, w, checks=["dtypes"]).failures
    bare = jax.custom_vjp(wave)
    bare.defvjp(lambda *args: jax.vjp(wave, *args), lambda pull, g: pull(g))
    report = check_vjp(bare, X, w, checks=["dtypes"], raises=False)
    assert {row.argument for row in report.failures} == {"w"}
    assert not check_vjp(bare, X, w, reference=wave, checks=["dtypes"]).failures


def test_rows_are_the_inputs_that_the_function_takes_longer():
    def scaled(x, scale):
        return x * scale

    cases = lambda *args: {r.case for r in check_vjp(scaled, *args, checks=["dtypes"]).rows}  # noqa: E731
    assert "bfloat16, 2048 rows" in cases(X, jnp.linspace(1, 2, 3))
    # A scale for each row is no sum over rows.
    assert cases(X, jnp.linspace(1, 2, 8)[:, None]) == {"float32", "bfloat16", "float16"}


def test_a_tolerance_of_the_user_is_relative_to_the_largest_value():
    wrong = with_mistake(too_much)
    loose = {"bfloat16": 3e-2, "float16": 3e-2}
    assert not check_vjp(wrong, PARAMS, X, checks=["dtypes"], tolerances=loose).failures
    with pytest.raises(GradientError, match="3e-03 allowed"):
        check_vjp(wrong, PARAMS, X, checks=["dtypes"], tolerances={"bfloat16": 3e-3})
