"""check_vjp says what an example does not cover."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flax_customgrad.testing import check_vjp

X = jax.random.normal(jax.random.key(0), (8, 3))
RANDOM = {"bias_init": nnx.initializers.normal(1.0)}


def hints(fn, *args, checks=(), **keywords):
    report = check_vjp(fn, *args, checks=checks, **keywords)
    assert not report.failures
    return [str(hint) for hint in report.not_covered]


def linear(*args, **kwargs):
    return nnx.Linear(*args, **{**RANDOM, **kwargs}, rngs=nnx.Rngs(0))


def conv(**kwargs):
    return nnx.Conv(3, 4, (2,), **RANDOM, **kwargs, rngs=nnx.Rngs(0))


def weighted(x, mask, ids=None, scale=None):
    return jnp.where(mask, x, 0.0) * (1 if ids is None else ids[:, None])


MASK = X > 0
IMAGES = jax.random.normal(jax.random.key(1), (8, 5, 3))


@pytest.mark.parametrize(
    ("fn", "args", "expected"),
    [
        (linear(3, 4), (X,), []),
        (linear(3, 4, use_bias=False), (X,), ["bias is None"]),
        (nnx.Linear(3, 4, rngs=nnx.Rngs(0)), (X,), ["bias is 0 everywhere"]),
        (linear(3, 3), (X,), ["kernel has axes of the same size, (3, 3)"]),
        (linear(3, 1), (X,), ["kernel has an axis of size 1, (3, 1)"]),
        (
            linear(3, 4),
            (X[:1],),
            ["inputs has a batch of 1", "inputs has an axis of size 1, (1, 3)"],
        ),
        (linear(3, 4), (jnp.ones((8, 3)),), ["inputs is 1 everywhere"]),
        (weighted, (X, MASK), []),
        (weighted, (X, MASK | True), ["mask is True everywhere"]),
        (weighted, (X, MASK & False), ["mask is False everywhere"]),
        (weighted, (X, MASK, jnp.arange(8)), ["ids holds no number twice"]),
        (weighted, (X, MASK, jnp.arange(8) % 5), []),
        (weighted, (X, MASK, jnp.arange(8) % 5, None), ["scale is None"]),
        (lambda x, slope: x * slope, (X, jnp.float32(1)), ["slope is 1"]),
        (lambda params: params["w"] * 2, ({"w": X, "bias": None},), ["params.bias is None"]),
        (
            conv(),
            (IMAGES,),
            [
                "mask is None",
                "strides is 1",
                "kernel_dilation is 1",
                "input_dilation is 1",
                "feature_group_count is 1",
            ],
        ),
    ],
)
def test_what_the_arguments_leave_uncovered(fn, args, expected):
    assert hints(fn, *args) == expected


def test_the_keywords_of_a_partial_are_settings_too():
    pool = functools.partial(nnx.avg_pool, window_shape=(2,), strides=(1,), padding="SAME")
    assert hints(pool, IMAGES) == ["strides is 1"]


def test_a_gradient_of_zeros_or_nans_shows_nothing():
    assert hints(jax.nn.relu, -jnp.abs(X), checks=["jit"]) == ["x has a gradient of 0 everywhere"]
    assert hints(jnp.sqrt, jnp.minimum(X, 0.0), checks=["jit"]) == [
        "x has an expected gradient that is not finite"
    ]


def test_hints_are_in_the_table_and_are_no_failures():
    report = check_vjp(linear(3, 3, use_bias=False), X, checks=["jit"])
    assert "not covered: kernel has axes of the same size, (3, 3); bias is None" in str(report)
