"""The five points of the contract, each on the linear example that newcomers start from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import flax_customgrad as fcg

MODES = [
    {"graph": True, "graph_updates": True},
    {"graph": True, "graph_updates": False},
    {"graph": False, "graph_updates": False},
]


@fcg.custom_vjp
def linear(m, x):
    return x @ m.kernel + m.bias


def linear_fwd(m, x):
    return linear(m, x), (m, x)


def linear_bwd(res, g):
    m, x = res
    return nnx.State({"kernel": x.T @ g, "bias": g.sum(0)}), g @ m.kernel.T


linear.defvjp(linear_fwd, linear_bwd)


def make(fun, bwd, **kwargs):
    """A custom gradient that keeps its arguments."""
    op = fcg.custom_vjp(fun, **kwargs)
    op.defvjp(lambda *args: (fun(*args), args), bwd)
    return op


@pytest.fixture
def module():
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (5, 3))


def loss(fn):
    return lambda m, x: jnp.sum(jnp.sin(fn(m, x)))


def plain(m, x):
    return x @ m.kernel + m.bias


def leaves(tree):
    return jax.tree.leaves(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)


def assert_same(got, expected, rtol=1e-5):
    chex.assert_trees_all_close(leaves(got), leaves(expected), rtol=rtol)


# 1. What the first argument may be, and what the backward receives.


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_module_comes_first_in_every_mode(module, x, mode):
    got = nnx.grad(loss(linear), argnums=(0, 1), **mode)(module, x)
    expected = nnx.grad(loss(plain), argnums=(0, 1), **mode)(module, x)
    for g, e in zip(got, expected, strict=True):
        assert type(g) is type(e)
        assert_same(g, e)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_default_modes_can_be_set_globally(module, x, mode):
    expected = nnx.grad(loss(plain))(module, x)
    with nnx.set_graph_mode(mode["graph"]), nnx.set_graph_updates(mode["graph_updates"]):
        assert_same(nnx.grad(loss(linear))(module, x), expected)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", [nnx.State, dict], ids=["State", "dict"])
def test_a_state_or_a_dict_comes_first(kind, x):
    def fun(params, x):
        return x @ params["kernel"] + params["bias"]

    def bwd(res, g):
        params, x = res
        return kind({"kernel": x.T @ g, "bias": g.sum(0)}), g @ params["kernel"].T

    op = make(fun, bwd)
    params = kind({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)})
    got = jax.grad(lambda p, x: jnp.sum(op(p, x) ** 2), argnums=(0, 1))(params, x)
    expected = jax.grad(lambda p, x: jnp.sum(fun(p, x) ** 2), argnums=(0, 1))(params, x)
    assert isinstance(got[0], kind)
    assert_same(got, expected)


def test_a_state_of_variables_may_be_answered_with_arrays_or_variables(module, x):
    def fun(params, x):
        return x @ params["kernel"][...] + params["bias"][...]

    def bwd(res, g):
        params, x = res
        state = nnx.State({"kernel": nnx.Param(x.T @ g), "bias": g.sum(0)})
        return state, g @ params["kernel"][...].T

    op = make(fun, bwd)
    state = nnx.state(module)
    got = jax.grad(lambda s: jnp.sum(jnp.sin(op(s, x))))(state)
    assert_same(got, nnx.grad(loss(plain))(module, x))


def test_nested_modules_are_answered_by_path(x):
    class Two(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.scale = nnx.Param(jnp.ones(3))

    def fun(m, x):
        return (x @ m.inner.kernel + m.inner.bias) * m.scale

    def bwd(res, g):
        m, x = res
        inner = x @ m.inner.kernel + m.inner.bias
        gi = g * m.scale
        grads = {
            "inner": {"kernel": x.T @ gi, "bias": gi.sum(0)},
            "scale": (g * inner).sum(0),
        }
        return nnx.State(grads), gi @ m.inner.kernel.T

    op, m = make(fun, bwd), Two()
    assert_same(nnx.grad(loss(op))(m, x), nnx.grad(loss(fun))(m, x))


def test_a_shared_submodule_counts_once(x):
    class Tied(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0))
            self.b = self.a

    def fun(m, x):
        return x @ m.a.kernel @ m.b.kernel

    def bwd(res, g):
        m, x = res
        k = m.a.kernel[...]
        assert m.a is m.b
        dk = x.T @ (g @ k.T) + (x @ k).T @ g
        return nnx.State({"a": {"kernel": dk}}), g @ k.T @ k.T

    op, m = make(fun, bwd), Tied()
    assert_same(nnx.grad(loss(op))(m, x), nnx.grad(loss(fun))(m, x))


@pytest.mark.smoke
def test_a_method_can_carry_a_backward(x):
    class Scale(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.full((3,), 2.0))

        @fcg.custom_vjp
        def __call__(self, x):
            return x * self.scale

        def _fwd(self, x):
            return x * self.scale, (self, x)

        def _bwd(res, g):
            self, x = res
            return nnx.State({"scale": (g * x).sum(0) * 10}), g * self.scale

        __call__.defvjp(_fwd, _bwd)

    m = Scale()
    grads = nnx.grad(lambda m: m(x).sum())(m)
    np.testing.assert_allclose(grads.scale[...], 10 * x.sum(0), rtol=1e-6)


def test_static_values_none_defaults_and_keywords(x):
    def fun(params, x, bias=None, power=2, mode="sum"):
        assert mode == "sum"
        y = (x * params["scale"]) ** power
        return y if bias is None else y + bias

    def bwd(res, g):
        params, x, bias, power, mode = res
        assert mode == "sum"
        d = g * power * (x * params["scale"]) ** (power - 1)
        bias_g = None if bias is None else g.sum(0)
        return {"scale": (d * x).sum(0)}, d * params["scale"], bias_g, None, None

    op = make(fun, bwd)
    params = {"scale": jnp.arange(1.0, 4.0)}
    for kwargs in ({}, {"power": 3}, {"bias": jnp.ones(3)}, {"mode": "sum", "power": 2}):
        got = jax.grad(lambda p, kw=kwargs: jnp.sum(op(p, x, **kw)))(params)
        assert_same(got, jax.grad(lambda p, kw=kwargs: jnp.sum(fun(p, x, **kw)))(params))
    bias = jnp.ones(3)
    assert_same(jax.grad(lambda b: jnp.sum(op(params, x, bias=b)))(bias), jnp.full(3, 5.0))


def test_trees_of_arrays_and_several_arguments(x):
    def fun(params, pair, *rest):
        return params["w"] * pair[0] + pair[1]["b"] + sum(rest)

    def bwd(res, g):
        params, pair, *rest = res
        gs = [g for _ in rest]
        return {"w": jnp.vdot(g, pair[0])}, (g * params["w"], {"b": g}), *gs

    op = make(fun, bwd)
    args = ({"w": jnp.array(2.0)}, (x, {"b": x}), x, x)
    got = jax.grad(lambda *a: jnp.sum(jnp.sin(op(*a))), argnums=(0, 1, 2, 3))(*args)
    expected = jax.grad(lambda *a: jnp.sum(jnp.sin(fun(*a))), argnums=(0, 1, 2, 3))(*args)
    assert_same(got, expected)


# 2. What the backward may leave out.


class Counting(nnx.Module):
    """A parameter beside everything that has no gradient."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(3))
        self.mean = nnx.BatchStat(jnp.zeros(3))
        self.amax = nnx.Variable(jnp.zeros(()))
        self.calls = nnx.Variable(jnp.array(0))
        self.rngs = nnx.Rngs(7)


def counting(m, x):
    noise = jax.random.uniform(m.rngs(), x.shape)
    m.calls[...] += 1
    m.mean[...] = 0.9 * m.mean[...] + 0.1 * x.mean(0)
    return x * m.scale + noise


def counting_bwd(res, g):
    m, x = res
    return nnx.State({"scale": (g * x).sum(0)}), g * m.scale


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_state_that_has_no_gradient_needs_no_mention_and_is_written(x, mode):
    op = fcg.custom_vjp(counting)
    op.defvjp(lambda m, x: (op(m, x), (m, x)), counting_bwd)
    ours, theirs = Counting(), Counting()

    def twice(m, fn):
        # Outside of a derivative, and inside one. Without graph updates nnx.grad differentiates
        # all of a Module, integers too, so here it is the input that is differentiated.
        first = fn(m, x)
        if mode["graph_updates"]:
            return first, nnx.state(nnx.grad(lambda m: fn(m, x).sum())(m), nnx.Param)
        return first, nnx.grad(lambda x, m: fn(m, x).sum(), **mode)(x, m)

    assert_same(twice(ours, op), twice(theirs, counting))
    assert int(ours.calls[...]) == int(theirs.calls[...])
    assert_same(nnx.state(ours, nnx.BatchStat), nnx.state(theirs, nnx.BatchStat))
    assert int(ours.rngs.default.count[...]) == int(theirs.rngs.default.count[...])


def test_a_module_may_hold_bare_arrays_and_refs(x):
    class Holding(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(3))
            self.offset = nnx.data(jnp.full(3, 2.0))
            self.amax = nnx.data(jax.new_ref(jnp.zeros(())))

    def fun(m, x):
        return x * m.scale + m.offset

    def bwd(res, g):
        m, x = res
        m.amax[...] = jnp.maximum(m.amax[...], jnp.abs(g).max())
        return nnx.State({"scale": (g * x).sum(0)}), g * m.scale

    op, m = make(fun, bwd), Holding()
    grads = nnx.grad(lambda m: 3 * op(m, x).sum())(m)
    np.testing.assert_allclose(grads.scale[...], 3 * x.sum(0), rtol=1e-5)
    assert float(m.amax[...]) == 3


def test_writes_reach_the_caller_through_jit(x):
    op = fcg.custom_vjp(counting)
    op.defvjp(lambda m, x: (op(m, x), (m, x)), counting_bwd)
    m = Counting()
    nnx.jit(lambda m, x: nnx.grad(lambda m: op(m, x).sum())(m))(m, x)
    assert int(m.calls[...]) == 1


def test_none_is_zero(module, x):
    op = make(plain, lambda res, g: (None, None))
    grads = nnx.grad(loss(op), argnums=(0, 1))(module, x)
    assert all(not np.any(leaf) for leaf in leaves(grads))
    op = make(plain, lambda res, g: (nnx.State({"kernel": None, "bias": g.sum(0)}), None))
    grads = nnx.grad(loss(op))(module, x)
    assert not np.any(grads.kernel[...])
    assert np.any(grads.bias[...])


def test_a_backward_writes_a_ref_and_nothing_else(module, x):
    def fun(m, x, amax):
        return plain(m, x)

    def bwd(res, g):
        m, x, amax = res
        amax[...] = jnp.maximum(amax[...], jnp.abs(g).max())
        return *linear_bwd((m, x), g), None

    op, amax = make(fun, bwd), jax.new_ref(jnp.zeros(()))
    nnx.grad(lambda m: 3 * op(m, x, amax).sum() + 2 * op(m, x, amax).sum())(module)
    assert float(amax[...]) == 3

    def writing(res, g):
        res[0].bias[...] += 1
        return linear_bwd(res, g)

    lost = r"backward of `plain` writes to bias of a Linear.*BackwardState"
    with pytest.raises(TypeError, match=lost):
        nnx.grad(loss(make(plain, writing)))(module, x)


def test_a_forward_that_changes_the_structure_is_refused(module, x):
    def fun(m, x):
        m.seen = nnx.Variable(x)
        return plain(m, x)

    with pytest.raises(TypeError, match="`fun` changed the structure of a Linear"):
        make(fun, linear_bwd)(module, x)


# 4. Dtypes. (3, the checks, is test_cotangents.)


def test_a_wider_cotangent_is_cast_once(x):
    def bwd(res, g):
        params, x = res
        wide = jnp.einsum("bi,bo->io", x, g, preferred_element_type=jnp.float32)
        return nnx.State({"kernel": wide}), g @ params["kernel"].T

    op = make(lambda params, x: x @ params["kernel"], bwd)
    params = nnx.State({"kernel": jnp.ones((3, 2), jnp.bfloat16)})
    grads = jax.grad(lambda p: jnp.sum(op(p, x.astype(jnp.bfloat16))))(params)
    assert grads["kernel"].dtype == jnp.bfloat16


# 5. Transforms and meshes.


def test_jit_vmap_scan_remat(module, x):
    expected = nnx.grad(loss(plain))(module, x)
    graphdef, params = nnx.split(module)

    def pure(params, x):
        return loss(linear)(nnx.merge(graphdef, params), x)

    assert_same(jax.jit(jax.grad(pure))(params, x), expected)
    assert_same(jax.grad(jax.checkpoint(pure))(params, x), expected)
    many = jnp.stack([x, x])
    mapped = jax.grad(lambda p: jax.vmap(pure, (None, 0))(p, many).sum())(params)
    assert_same(mapped, jax.tree.map(lambda g: 2 * g, nnx.state(expected)))

    def body(total, x):
        return total + pure(params_, x), None

    def scanned(p):
        nonlocal params_
        params_ = p
        return jax.lax.scan(body, 0.0, many)[0]

    params_ = params
    assert_same(jax.grad(scanned)(params), jax.tree.map(lambda g: 2 * g, nnx.state(expected)))


def test_second_derivatives(module, x):
    graphdef, params = nnx.split(module)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def of(fn):
        return lambda flat: loss(fn)(nnx.merge(graphdef, unravel(flat)), x)

    assert_same(jax.hessian(of(linear))(flat), jax.hessian(of(plain))(flat), rtol=1e-4)
    reverse = jax.jacrev(jax.jacrev(of(linear)))(flat)
    assert_same(reverse, jax.hessian(of(plain))(flat), rtol=1e-4)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_meshes(module, axis_type):
    x = jnp.arange(24.0).reshape(8, 3) / 10

    def bwd(res, g):
        m, x = res
        explicit = axis_type is AxisType.Explicit
        like = {"out_sharding": jax.typeof(m.kernel[...]).sharding} if explicit else {}
        dkernel = jnp.einsum("bi,bo->io", x, g, **like)
        return nnx.State({"kernel": dkernel, "bias": g.sum(0)}), g @ m.kernel.T

    op = make(plain, bwd)
    expected = jax.jit(nnx.grad(loss(plain)))(module, x)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(axis_type,))):
        split = jax.device_put(x, PartitionSpec("data"))
        whole = jax.tree.map(lambda a: jax.device_put(a, PartitionSpec()), nnx.state(module))
        m = nnx.merge(nnx.graphdef(module), whole)
        assert_same(nnx.jit(nnx.grad(loss(op)))(m, split), expected)


def test_an_ambiguous_product_on_an_explicit_mesh_says_what_to_write(module):
    x = jnp.ones((8, 3))
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
        split = jax.device_put(x, PartitionSpec("data"))
        whole = jax.tree.map(lambda a: jax.device_put(a, PartitionSpec()), nnx.state(module))
        m = nnx.merge(nnx.graphdef(module), whole)
        with pytest.raises(Exception, match="out_sharding") as caught:
            nnx.grad(loss(linear))(m, split)
    assert any("jax.typeof(kernel).sharding" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(module, check_vma):
    x = jnp.arange(24.0).reshape(8, 3) / 10
    graphdef, params = nnx.split(module)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def total(params, fn):
        local = jax.shard_map(
            lambda params, x: loss(fn)(nnx.merge(graphdef, params), x)[None],
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec("data"),
            check_vma=check_vma,
        )
        return local(params, x).sum()

    got = jax.grad(lambda p: total(p, linear))(params)
    assert_same(got, jax.grad(lambda p: loss(plain)(nnx.merge(graphdef, p), x))(params), rtol=1e-4)


def test_export(module, x):
    graphdef, params = nnx.split(module)
    batch = jax.export.symbolic_shape("b, 3")
    gradient = jax.jit(jax.grad(lambda p, x: loss(linear)(nnx.merge(graphdef, p), x)))
    spec = jax.ShapeDtypeStruct(batch, jnp.float32)
    exported = jax.export.export(gradient)(jax.tree.map(jnp.asarray, params), spec)
    assert_same(exported.call(params, x), nnx.grad(loss(plain))(module, x))


# The decorator itself.


@pytest.mark.smoke
def test_what_is_wrong_with_a_definition_is_said():
    with pytest.raises(TypeError, match="`f` takes the keyword-only argument `power`"):

        @fcg.custom_vjp
        def f(m, *, power):
            return m

    @fcg.custom_vjp
    def g(x):
        return x

    with pytest.raises(TypeError, match=r"`g` has no backward yet: call `g.defvjp\(fwd, bwd\)`"):
        g(jnp.ones(2))
    with pytest.raises(TypeError, match="defvjp of `g` takes two functions"):
        g.defvjp(None, None)
    g.defvjp(lambda x: x, lambda res, g: (g,))
    with pytest.raises(TypeError, match=r"fwd of `g` returned float32\[2\]; expected a pair"):
        jax.grad(lambda x: g(x).sum())(jnp.ones(2))
    with pytest.raises(TypeError, match="an argument of g holds a set"):
        g({1, 2})


def test_the_decorated_function_keeps_its_name_and_documentation():
    def f(x):
        """Doubles."""
        return 2 * x

    op = fcg.custom_vjp(f)
    assert (op.__name__, op.__doc__, op.fun) == ("f", "Doubles.", f)


def test_surrogates_take_a_keyword():
    op = make(lambda x: jnp.round(x), lambda res, g: (g,), surrogate=True)
    assert op.surrogate
    np.testing.assert_array_equal(jax.grad(lambda x: op(x).sum())(jnp.ones(2)), 1.0)


def test_second_derivatives_of_a_surrogate_take_its_gradient_for_the_derivative():
    op = fcg.custom_vjp(surrogate=True)(lambda x: jnp.round(x))
    op.defvjp(lambda x: (op(x), None), lambda _, g: (g,))
    second = jax.grad(jax.grad(lambda x: jnp.sin(op(x))))(1.3)
    np.testing.assert_allclose(second, -np.sin(1), rtol=1e-6)
    third = jax.grad(jax.grad(jax.grad(lambda x: jnp.sin(op(x)))))(1.3)
    np.testing.assert_allclose(third, -np.cos(1), rtol=1e-6)


def test_a_backward_gets_an_array_where_the_gradient_is_at_a_number():
    @fcg.custom_vjp
    def square(x):
        return x * x

    def backward(x, g):
        assert isinstance(x, jax.Array)
        assert x.shape == ()
        return (2 * g * x,)

    square.defvjp(lambda x: (square(x), x), backward)
    assert jax.grad(square)(2.0) == 4
    np.testing.assert_allclose(jax.grad(fcg.logsumexp)(2.0), 1)
