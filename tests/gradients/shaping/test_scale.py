"""Scale and reversal: what the gradient is multiplied by, when, and in which dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flax_customgrad as fcg

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
FUNCTIONS = {"scale": (fcg.gradient_scale, 1), "reversal": (fcg.gradient_reversal, -1)}
MODULES = {"scale": fcg.GradientScale, "reversal": fcg.GradientReversal}


def pulled(function, amounts, x, g):
    """The gradient of each of the amounts, in one program."""
    results = jax.jit(
        lambda x, g: [
            (y, *pull(g))
            for a in amounts
            for y, pull in [jax.vjp(lambda x, a=a: function(x, a), x)]
        ]
    )(x, g)
    for y, dx in results:
        np.testing.assert_array_equal(*(np.asarray(a, np.complex64) for a in (y, x)))
        assert (y.dtype, dx.shape, dx.dtype) == (x.dtype, x.shape, x.dtype)
    return [dx for _, dx in results]


@pytest.fixture(params=FUNCTIONS)
def which(request):
    return request.param


@pytest.mark.smoke
def test_the_formula_in_float64(which):
    function, sign = FUNCTIONS[which]
    amounts = (0.3, 2, 0.0, np.float32(0.7), np.array([0.1, -2.0, 1e3]))
    with jax.enable_x64(True):
        x, g = np.random.default_rng(0).standard_normal((2, 4, 3))
        for amount, dx in zip(amounts, pulled(function, amounts, x, g), strict=True):
            np.testing.assert_allclose(dx, sign * np.asarray(amount) * g, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_half_precision_is_rounded_once(which, dtype):
    function, sign = FUNCTIONS[which]
    g = np.asarray([1.0, 3e4, -7.0, 1e-3, np.inf, np.nan], dtype)
    expected = np.asarray(sign * np.float32(0.1) * np.asarray(g, np.float32), dtype)
    for dx in pulled(function, (0.1, np.float32(0.1)), np.ones_like(g), g):
        np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (dx, expected)))


@pytest.mark.parametrize("amount", ["number", "array"])
def test_other_arrays(which, amount):
    function, sign = FUNCTIONS[which]
    amount = 0.5 if amount == "number" else jnp.float32(0.5)
    for x in (jnp.arange(3), jnp.array([True]), np.arange(3), 2):
        assert jnp.array_equal(function(x, amount), x)
    assert function(jnp.zeros((0, 3)), amount).shape == (0, 3)
    x = np.complex64([1 + 2j, -1j])
    np.testing.assert_allclose(pulled(function, [amount], x, x), [sign * 0.5 * x])


def test_traced_and_batched_amounts(which):
    function, sign = FUNCTIONS[which]
    x, amounts = np.ones((4, 3), np.float32), np.arange(4.0, dtype=np.float32)

    @jax.jit
    def gradients(x, amount, amounts):
        gradient = jax.grad(lambda x, a: jnp.sum(function(x, a)))
        of_amount = jax.grad(lambda a: jnp.sum(function(x, a)))(amount)
        return gradient(x, amount), jax.vmap(gradient)(x, amounts), of_amount

    traced, batched, of_amount = gradients(x, np.float32(0.25), amounts)
    np.testing.assert_array_equal(traced, sign * 0.25 * x)
    np.testing.assert_array_equal(batched, sign * amounts[:, None] * x)
    # Nothing flows into the amount.
    assert of_amount == 0


def test_a_surrogate_stays_inside_use_autodiff(which):
    function, sign = FUNCTIONS[which]
    with fcg.use_autodiff():
        assert jax.grad(lambda x: function(x, 3.0))(1.0) == sign * 3


def test_a_schedule(which):
    layer, sign = MODULES[which](optax.linear_schedule(0.0, 1.0, 10)), FUNCTIONS[which][1]
    gradient = nnx.jit(nnx.grad(lambda x, layer, step: jnp.sum(layer(x, step))))
    x = jnp.ones(2)
    for step, expected in [(0, 0), (5, 0.5), (20, 1)]:
        np.testing.assert_array_equal(gradient(x, layer, jnp.int32(step)), [sign * expected] * 2)
    count = nnx.Variable(jnp.int32(5))  # as an optimizer counts
    np.testing.assert_array_equal(gradient(x, layer, count), [sign * 0.5] * 2)


def test_an_array_may_be_replaced_without_compiling_anew(which):
    layer, sign = MODULES[which](jnp.float32(1)), FUNCTIONS[which][1]
    traced = []

    @nnx.jit
    def gradient(layer, x):
        traced.append(1)
        return nnx.grad(lambda x, layer: jnp.sum(layer(x)))(x, layer)

    name = "scale" if which == "scale" else "strength"
    for amount in (1.0, 0.5):
        setattr(layer, name, jnp.float32(amount))
        assert gradient(layer, jnp.ones(1)) == sign * amount
    assert len(traced) == 1


def test_a_step_is_not_looked_at_without_a_schedule(which):
    assert MODULES[which](2.0)(3.0, step=7) == 3


def test_bad_arguments(which):
    (function, _), module = FUNCTIONS[which], MODULES[which]
    name = "scale" if which == "scale" else "strength"
    for make, of in [(lambda a: function(jnp.ones((2, 3)), a), function), (module, module)]:
        where = f"{of.__name__}: {name}"
        for bad in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{where}={bad} must be finite"):
                make(bad)
        for bad in ("1", None, [1.0], 1j):
            with pytest.raises(TypeError, match=f"{where} is .*; write a number or an array"):
                make(bad)
        with pytest.raises(TypeError, match=f"{where} is an array of complex64"):
            make(jnp.array(1j))
        with pytest.raises(TypeError, match=f"{where} is an array of bool"):
            make(jnp.array(True))
    for shape in ((2,), (1, 2, 3), (4, 1, 3)):
        with pytest.raises(ValueError, match=r"does not broadcast to the shape \(2, 3\) of x"):
            function(jnp.ones((2, 3)), jnp.ones(shape))
    with pytest.raises(TypeError, match=rf"{module.__name__}: {name} is a schedule.*layer\(x, st"):
        module(lambda step: step)(1.0)


def test_a_variable_is_read_at_each_call(which):
    amount, sign = nnx.Variable(jnp.float32(0.5)), FUNCTIONS[which][1]
    layer, x = MODULES[which](amount), jnp.ones(2)
    for value in (0.5, 0.25):
        amount[...] = jnp.float32(value)
        gradient = nnx.grad(lambda x, layer: jnp.sum(layer(x)))(x, layer)
        np.testing.assert_array_equal(gradient, [sign * value] * 2)
    with pytest.raises(TypeError, match="is an array of complex64"):
        MODULES[which](nnx.Variable(jnp.array(1j)))


def test_each_array_of_a_tree(which):
    layer, sign = MODULES[which](0.5), FUNCTIONS[which][1]
    tree = {"a": jnp.ones((2, 3)), "b": [jnp.ones(()), jnp.arange(2)], "c": None}
    out = layer(tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, out, tree)
    gradient = jax.grad(lambda a: jnp.sum(layer({**tree, "a": a})["a"]))(tree["a"])
    np.testing.assert_array_equal(gradient, np.full((2, 3), sign * 0.5))
