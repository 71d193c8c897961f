"""Usages that a newcomer writes: each works, or its error says what to write instead."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import pytest
from flax import nnx, struct

import flax_customgrad as fcg


@fcg.custom_vjp
def double(x):
    return 2 * x


double.defvjp(lambda x: (2 * x, None), lambda res, g: (2 * g,))


def with_rules(fun, fwd, bwd):
    op = fcg.custom_vjp(fun)
    op.defvjp(fwd, bwd)
    return op


def test_an_operation_is_copied_and_pickled_by_its_name():
    assert copy.copy(double) is double
    assert copy.deepcopy({"op": double})["op"] is double
    assert pickle.loads(pickle.dumps(fcg.CustomVJP)) is fcg.CustomVJP
    assert double.__reduce__() == "double"


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("make", [nnx.Rngs, lambda seed: nnx.Rngs(seed)["default"]])
def test_a_random_stream_among_the_arguments_advances(make, jit):
    def noisy(x, rngs):
        return x + jax.random.normal(rngs(), x.shape)

    op = with_rules(noisy, lambda x, r: (noisy(x, r), None), lambda res, g: (g, None))
    rngs, x = make(0), jnp.zeros(3)
    call = jit(lambda x, rngs: op(x, rngs))
    first, second = call(x, rngs), call(x, rngs)
    assert not jnp.array_equal(first, second)
    again = make(0)
    nnx.grad(lambda x, rngs: op(x, rngs).sum())(x, again)
    assert jnp.array_equal(call(x, again), second)


def test_a_static_leaf_of_a_dict_needs_no_cotangent():
    def scaled(params, x):
        return params["n"] * params["w"] * x

    op = with_rules(
        scaled,
        lambda p, x: (scaled(p, x), (p, x)),
        lambda res, g: ({"w": res[0]["n"] * res[1] * g}, None),
    )
    w = jax.grad(lambda w: op({"w": w, "n": 5}, jnp.float32(3.0)))(jnp.float32(1.0))
    assert w == 15


def test_a_variable_is_an_array():
    op = with_rules(
        lambda w, x: w[...] * x, lambda w, x: (w[...] * x, x), lambda x, g: (x * g, None)
    )
    grads = nnx.grad(lambda w: op(w, jnp.float32(3.0)))(nnx.Param(jnp.float32(2.0)))
    assert grads[...] == 3


def test_none_is_answered_with_none():
    op = with_rules(lambda x, b: 2 * x, lambda x, b: (2 * x, None), lambda res, g: (2 * g, g))
    with pytest.raises(fcg.CotangentError, match=r"`b` .* is None, which has no gradient: write"):
        jax.grad(op)(1.0, None)


def test_a_key_of_another_kind_is_told():
    op = with_rules(
        lambda p, x: p[0] * x, lambda p, x: (p[0] * x, x), lambda x, g: ({"0": x * g}, None)
    )
    with pytest.raises(fcg.CotangentError, match=r"differ in kind, '0', a str and 0, a int"):
        jax.grad(lambda w: op({0: w}, jnp.float32(1.0)))(jnp.float32(1.0))


def test_a_forward_of_another_shape_or_dtype_is_refused():
    for wrong in (lambda x: x[None], lambda x: x.astype(jnp.bfloat16), lambda x: (x, x)):
        op = with_rules(lambda x: x, lambda x, wrong=wrong: (wrong(x), None), lambda res, g: (g,))
        with pytest.raises(TypeError, match=r"the fwd of .* returned the output .* and the"):
            jax.grad(lambda x, op=op: jnp.sum(jax.tree.leaves(op(x))[0]))(jnp.ones(3))


def test_a_forward_that_returns_its_pair_the_wrong_way_round_is_told():
    op = with_rules(jnp.sin, lambda x: (None, jnp.sin(x)), lambda x, g: (g,))
    with pytest.raises(TypeError, match=r"fwd returns \(output, residuals\)"):
        jax.grad(op)(1.0)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_forward_writes_what_the_function_writes(transform):
    class Counter(nnx.Module):
        def __init__(self):
            self.calls = nnx.BatchStat(jnp.zeros(()))

    def count(m, x):
        m.calls[...] += 1
        return x

    op = with_rules(count, lambda m, x: (x, None), lambda res, g: (None, g))
    counter = Counter()
    with pytest.raises(TypeError, match=r"write different Variables \(calls\): fwd .* has to"):
        transform(jax.grad(lambda x: op(nnx.clone(counter), x)))(1.0)


def test_rules_in_the_wrong_order_are_refused():
    op = fcg.custom_vjp(lambda a, b, c: a)
    with pytest.raises(TypeError, match=r"the fwd of .* 3 arguments, .* takes first fwd, then bwd"):
        op.defvjp(lambda res, g: (g, None, None), lambda a, b, c: (a, None))


def test_rules_that_are_bound_methods_are_told_where_to_be():
    class Layer(nnx.Module):
        @fcg.custom_vjp
        def scale(self, x):
            return x

        def fwd(self, x):
            return x, None

        def bwd(self, res, g):
            return None, g

    layer = Layer()
    with pytest.raises(TypeError, match=r"of a method, decorate the function in the class body"):
        layer.scale.defvjp(layer.fwd, layer.bwd)
    layer.scale.defvjp(Layer.fwd, layer.bwd)
    assert jax.grad(layer.scale)(1.0) == 1


def test_a_backward_written_for_nnx_is_told():
    def bwd(res, g):
        _, g = g
        return (2 * g,)

    op = with_rules(lambda x: 2 * x, lambda x: (2 * x, None), bwd)
    with pytest.raises(ValueError, match="unpack") as caught:
        jax.grad(lambda x: op(x).sum())(jnp.ones(3))
    assert "the cotangent of the output itself: float32[3]" in caught.value.__notes__[0]


def test_keywords_of_jax_are_answered():
    with pytest.raises(TypeError, match=r"takes no nondiff_argnums: .* static by itself"):
        fcg.custom_vjp(jnp.sin, nondiff_argnums=(1,))
    with pytest.raises(TypeError, match=r"a functools.partial of .* decorate the function itself"):
        fcg.custom_vjp(functools.partial(jnp.sum, axis=0))


def test_a_static_method_carries_a_backward():
    class Layer:
        @fcg.custom_vjp
        @staticmethod
        def scale(x):
            return 2 * x

        scale.defvjp(lambda x: (2 * x, None), lambda res, g: (3 * g,))

    assert jax.grad(Layer.scale)(1.0) == jax.grad(Layer().scale)(1.0) == 3
    with pytest.raises(TypeError, match="write @classmethod above @custom_vjp"):
        fcg.custom_vjp(classmethod(lambda cls, x: x))


def test_a_class_method_carries_a_backward():
    class Layer:
        factor = 2

        @classmethod
        @fcg.custom_vjp
        def scale(cls, x):
            return cls.factor * x

        scale.__func__.defvjp(
            lambda cls, x: (cls.factor * x, cls), lambda cls, g: (None, 3 * cls.factor * g)
        )

    assert jax.grad(Layer.scale)(1.0) == 6


@struct.dataclass
class Affine:
    scale: jax.Array
    offset: jax.Array
    power: int = struct.field(pytree_node=False, default=2)


def affine(p, x):
    return p.scale * x**p.power + p.offset


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_dataclass_is_answered_with_its_like(transform):
    def bwd(res, g):
        p, x = res
        return p.replace(scale=(g * x**p.power).sum(), offset=g.sum()), None

    op = with_rules(affine, lambda p, x: (affine(p, x), (p, x)), bwd)
    p, x = Affine(jnp.float32(2), jnp.float32(1)), jnp.arange(3.0)
    got, expected = (transform(jax.grad(lambda p, f=f: f(p, x).sum()))(p) for f in (op, affine))
    assert jax.tree.map(float, got) == jax.tree.map(float, expected)
    named = with_rules(
        affine, lambda p, x: (affine(p, x), None), lambda _, g: ({"scale": g.sum()}, None)
    )
    with pytest.raises(fcg.CotangentError) as caught:
        transform(jax.grad(lambda p: named(p, x).sum()))(p)
    assert str(caught.value) == (
        "the cotangent of argument `p` of `affine` is dict({'scale': float32[]}); expected the "
        "structure of the argument, Affine(scale=float32[], offset=float32[])"
    )


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_object_that_holds_a_differentiated_array_is_refused(transform):
    class Scale:
        def __init__(self, w):
            self.w = w

        @fcg.custom_vjp
        def apply(self, x):
            return self.w * x

        apply.defvjp(lambda self, x: (self.w * x, self.w), lambda w, g: (None, w * g))

    assert transform(jax.grad(lambda x: Scale(jnp.float32(3)).apply(x)))(1.0) == 3
    with pytest.raises(TypeError, match=r"is given a Scale of .* make it an nnx.Module or a flax"):
        transform(jax.grad(lambda w: Scale(w).apply(1.0)))(3.0)


def test_a_variable_that_holds_a_dict_is_answered_with_a_dict():
    class Affine(nnx.Module):
        def __init__(self):
            self.w = nnx.Param({"scale": jnp.ones(3), "offset": jnp.zeros(3)})

    def affine(m, x):
        return m.w["scale"] * x + m.w["offset"]

    op = with_rules(
        affine,
        lambda m, x: (affine(m, x), x),
        lambda x, g: ({"w": {"scale": (g * x).sum(0), "offset": g.sum(0)}}, None),
    )
    x = jnp.arange(6.0).reshape(2, 3)
    got, expected = (nnx.grad(lambda m, f=f: f(m, x).sum())(Affine()) for f in (op, affine))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, got, expected))


def test_a_call_that_does_not_fit_names_the_operation():
    with pytest.raises(TypeError, match=r"`double\(x\)`: got an unexpected keyword argument 'y'"):
        double(1.0, y=2)
