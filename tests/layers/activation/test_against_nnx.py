"""Values, gradients and dtypes of the pointwise functions are those of flax.nnx."""

import copy
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_, jnp.complex64]


def weights(y):
    return jnp.cos(1.0 + jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)


def weighed(f):
    """A number made of f's output, whose second derivatives do not vanish."""

    def loss(*args):
        y = f(*args)
        return jnp.sum(jnp.sin(y) * weights(y))

    return loss


def both(results, pairs, *args):
    """What a function of a function and of arrays makes of every pair, in one program."""

    def program(*args):
        return {name: [results(f, *args) for f in pair] for name, pair in pairs.items()}

    return jax.jit(program)(*args)


def close(name, ours, theirs, tolerance):
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (name, a.shape, a.dtype) == (name, b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


def test_value_and_derivatives_in_float64(pointwise):
    def results(f, x):
        first, second = jax.grad(weighed(f)), jax.grad(weighed(jax.grad(weighed(f))))
        return f(x), first(x), second(x)

    with jax.enable_x64(True):
        x = 3 * jax.random.normal(jax.random.key(0), (5, 7), jnp.float64)
        for name, (ours, theirs) in both(results, pointwise, x).items():
            close(name, ours, theirs, 1e-12)


BENDS = {
    "relu": [0.0, -0.0],
    "relu6": [0.0, 6.0],
    "hard_tanh": [-1.0, 1.0],
    "hard_sigmoid": [-3.0, 3.0],
    "hard_silu": [-3.0, 3.0],
    "leaky_relu": [0.0, -0.0],
    "elu": [0.0, -0.0],
    "selu": [0.0, -0.0],
    "celu": [0.0, -0.0],
    "soft_sign": [0.0, -0.0],
}


def test_the_derivative_at_a_bend_is_that_of_nnx(pointwise):
    bends = {name: jnp.array(BENDS.get(name.partition(",")[0], [0.0, 0.0])) for name in pointwise}

    def program(bends):
        return {
            name: [jax.vmap(jax.grad(f))(bends[name]) for f in pair]
            for name, pair in pointwise.items()
        }

    for name, (ours, theirs) in jax.jit(program)(bends).items():
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=name)


def test_a_parameter_that_is_an_array_has_a_gradient(parametrized):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (4, 3), jnp.float64)
        shapes = [(), (3,), (4, 1), (1, 1), (2, 4, 3)]
        ps = [0.5 + jax.random.uniform(jax.random.key(1), s, jnp.float64) for s in shapes]

        def results(f, x, ps):
            return [(f(x, p), jax.grad(weighed(f), (0, 1))(x, p)) for p in ps]

        for name, (ours, theirs) in both(results, parametrized, x, ps).items():
            close(name, ours, theirs, 1e-12)


def test_a_parameter_that_is_a_number_has_none(parametrized):
    x = jax.random.normal(jax.random.key(0), (4, 3))
    numbers = [0.3, 2, np.float32(0.3), np.array([0.3, 1.0, 2.0], np.float32)]

    def results(f, x):
        return [(f(x, p), jax.grad(lambda x, p=p: weighed(f)(x, p))(x)) for p in numbers]

    for name, (ours, theirs) in both(results, parametrized, x).items():
        close(name, ours, theirs, 1e-6)


def test_parameters_have_the_names_of_nnx(parametrized):
    names = {"leaky_relu": "negative_slope", "squareplus": "b"}
    x = jnp.array([-1.0, 2.0])
    for name, (ours, theirs) in parametrized.items():
        y = ours(x=x, **{names.get(name, "alpha"): 0.5})
        np.testing.assert_allclose(y, theirs(x, 0.5), rtol=1e-6, err_msg=name)


def test_float32_agrees_to_the_last_digits(pointwise):
    x = 4 * jax.random.normal(jax.random.key(0), (1000,))
    for name, (ours, theirs) in both(lambda f, x: f(x), pointwise, x).items():
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6, err_msg=name)


def outcome(f, *args):
    """The type of what f returns, or of the error that it raises."""
    try:
        y = jax.eval_shape(f, *args)
    except Exception as error:
        return type(error)
    return y.shape, y.dtype, y.weak_type


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_dtypes_are_those_of_nnx(pointwise, x64):
    with jax.enable_x64(x64):
        # Without x64 the others are the same, and with it those of 32 bits are.
        dtypes = [jnp.float32, jnp.float64, jnp.int64] if x64 else DTYPES
        for name, (ours, theirs) in pointwise.items():
            for dtype in dtypes:
                x = jax.ShapeDtypeStruct((2, 3), dtype)
                assert outcome(ours, x) == outcome(theirs, x), (name, dtype)
            for number in (1, 1.5, True, jnp.asarray(1.5)):
                assert outcome(ours, number) == outcome(theirs, number), (name, number)


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_dtypes_promote_as_in_nnx(parametrized, x64):
    with jax.enable_x64(x64):
        dtypes = [jnp.bfloat16, jnp.float32, jnp.float64, jnp.int32] if x64 else DTYPES
        numbers = [0.5, 2, np.float64(0.5)]
        for x, p in itertools.product(dtypes, (*dtypes, *numbers)):
            args = [jnp.ones(3, x), p if p in numbers else jnp.ones(3, p)]
            for name, (ours, theirs) in parametrized.items():
                assert outcome(ours, *args) == outcome(theirs, *args), (name, args)


@pytest.mark.parametrize(
    "x",
    [np.float32([-1, 2]), 1.5, 2, np.arange(3), 1j],
    ids=["numpy", "float", "int", "integers", "complex"],
)
def test_other_inputs(pointwise, x):
    def result(f):
        try:
            return f(x)
        except Exception as error:
            errors.append(type(error))
            return None

    errors = []
    for name, (ours, theirs) in both(result, pointwise).items():
        if theirs is None:
            assert ours is None, name
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=name)
    # Ours and theirs raise one after the other.
    assert errors[::2] == errors[1::2]
    np.testing.assert_allclose(fcg.relu(x), nnx.relu(x))


def test_a_variable_is_its_value(pointwise):
    x = jnp.array([-1.0, 2.0])
    results = jax.jit(lambda p: {name: f(p) for name, (f, _) in pointwise.items()})
    jax.tree.map(np.testing.assert_array_equal, results(nnx.Param(x)), results(x))


def test_a_list_is_refused_as_nnx_does(pointwise):
    for pair in pointwise.values():
        for f in pair:
            with pytest.raises(TypeError):
                f([1.0, 2.0])


def test_odd_shapes(pointwise):
    xs = [jax.random.normal(jax.random.key(0), shape) for shape in ((), (3, 0))]

    def results(f, xs):
        return [(f(x), jax.grad(weighed(f))(x)) for x in xs]

    for name, (ours, theirs) in both(results, pointwise, xs).items():
        close(name, ours, theirs, 1e-5)


def test_forward_mode():
    x = (jnp.array([-1.0, 2.0]),)
    np.testing.assert_allclose(jax.jvp(fcg.silu, x, x), jax.jvp(nnx.silu, x, x), 1e-6)


def test_relu_knows_three_residuals():
    with pytest.raises(ValueError, match=r"residual='bit' is none of 'mask', 'bits', 'output'"):
        fcg.relu(jnp.ones(3), residual="bit")  # type: ignore[arg-type]


def test_a_function_is_one_object_under_every_name():
    assert fcg.swish is fcg.silu
    assert fcg.hard_swish is fcg.hard_silu
    assert copy.deepcopy(fcg.silu) is fcg.silu
    assert pickle.loads(pickle.dumps(fcg.silu)) is fcg.silu


def test_an_activation_can_be_a_part_of_a_module():
    class Block(nnx.Module):
        def __init__(self, act, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.act = act

        def __call__(self, x):
            return self.act(self.linear(x))

    def gradients(act):
        block = Block(act, nnx.Rngs(0))
        return jax.tree.leaves(nnx.jit(nnx.grad(lambda m: m(jnp.ones((2, 3))).sum()))(block))

    for a, b in zip(gradients(fcg.gelu), gradients(nnx.gelu), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
