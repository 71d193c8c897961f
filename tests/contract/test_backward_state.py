"""BackwardState: what a backward writes reaches the layer, or there is an error."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax import lax

import flax_customgrad as fcg

MODES = ({}, {"graph_updates": False}, {"graph": False})
x = jnp.arange(1.0, 4)


@fcg.custom_vjp
def watch(x, history):
    return 2 * x


def _fwd(x, history):
    return watch(x, history), history


def _bwd(history, g):
    history[...] = jnp.roll(history[...], 1).at[0].set(jnp.abs(g).max())
    return 2 * g, None


watch.defvjp(_fwd, _bwd)


class Watch(nnx.Module):
    def __init__(self, value=None):
        self.w = nnx.Param(jnp.ones(3))
        value = np.zeros(3, np.float32) if value is None else value
        self.history = fcg.BackwardState(value, name="Watch.history")

    def __call__(self, x):
        return watch(self.w * x, self.history)


def loss(m, x, scale=1.0):
    return scale * m(x).sum()


def seen(m):
    return m.history[...].tolist()


# Where it is written.


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_modes_of_nnx(mode):
    m, grad = Watch(), nnx.grad(loss, **mode)
    grad(m, x)
    assert seen(m) == [1, 0, 0]
    step = nnx.jit(grad, **mode)
    step(m, x, 2.0)
    step(m, x, 3.0)
    assert seen(m) == [3, 2, 1]
    nnx.grad(nnx.remat(loss, **mode), **mode)(m, x, 4.0)
    assert seen(m) == [4, 3, 2]
    # The forward alone, which reads nothing either.
    y = nnx.jit(lambda m, x: m(x), **mode)(m, x)
    assert y.tolist() == [2, 4, 6]
    assert seen(m) == [4, 3, 2]


def test_functions_of_jax():
    m = Watch()
    graphdef, params = nnx.split(m)

    def objective(params, x):
        return nnx.merge(graphdef, params)(x).sum()

    jax.jit(jax.grad(objective))(params, x)
    assert seen(m) == [1, 0, 0]

    def step(params, scale):
        grads = jax.grad(lambda p: scale * objective(p, x))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

    jax.jit(lambda p: lax.scan(step, p, jnp.array([2.0, 3.0])))(params)
    assert seen(m) == [3, 2, 1]
    # Calls of one layer, in the order of the backward passes.
    scales = jnp.array([[4.0], [5.0]])
    jax.jit(jax.grad(lambda p: (scales * lax.map(nnx.merge(graphdef, p), scales * x)).sum()))(
        params
    )
    assert seen(m) == [4, 5, 3]
    jax.grad(lambda x: (m(m(x)) * 3).sum())(x)
    assert seen(m) == [6, 3, 4]
    compiled = nnx.jit(nnx.grad(loss)).lower(m, x).compile()
    compiled(m, x)
    assert seen(m) == [1, 6, 3]


def test_it_may_come_inside_of_its_module():
    @fcg.custom_vjp
    def op(m, x):
        return m.inner[0].w * x

    def bwd(res, g):
        m, x = res
        m.inner[0].history[0] = jnp.maximum(m.inner[0].history[0], jnp.abs(g).max())
        return nnx.State({"inner": {0: {"w": g * x}}}), None

    op.defvjp(lambda m, x: (op(m, x), (m, x)), bwd)

    class Outer(nnx.Module):
        def __init__(self):
            self.inner = nnx.List([Watch()])

    m = Outer()
    grads = nnx.grad(lambda m: 3 * op(m, x).sum() + op(m, x).sum())(m)
    assert grads.inner[0].w[...].tolist() == [4, 8, 12]
    assert seen(m.inner[0]) == [3, 0, 0]
    nnx.jit(nnx.grad(lambda m: lax.map(lambda x: 5 * op(m, x).sum(), x[None]).sum()))(m)
    assert seen(m.inner[0]) == [5, 0, 0]


def test_a_second_derivative_writes_values():
    m = Watch()
    square = jax.grad(lambda x: (m(x) ** 2).sum())
    second = jax.jit(jax.grad(lambda x: square(x).sum()))(x)
    assert second.tolist() == [8, 8, 8]
    assert np.isfinite(seen(m)).all()


# Where it cannot be.


def test_under_vmap_it_is_read_but_not_written():
    m = Watch()
    xs = jnp.stack([x, 2 * x])
    mapped = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))
    assert jax.vmap(m)(xs).shape == (2, 3)
    for gradient in (
        lambda: jax.vmap(jax.grad(lambda x: m(x).sum()))(xs),
        lambda: nnx.grad(lambda m: mapped(m, xs).sum())(m),
    ):
        with pytest.raises(fcg.BackwardStateError, match=r"Watch.history: float32\[3\] is written"):
            gradient()
    assert seen(m) == [0, 0, 0]


def test_under_cond_it_is_written_or_refused():
    m = Watch()
    gradient = jax.grad(lambda x: lax.cond(x[0] > 0, m, lambda x: x, x).sum())
    if jax.__version_info__ < (0, 12):
        with pytest.raises(KeyError, match="AbstractRef"):
            gradient(x)
    else:
        gradient(x)
        assert seen(m) == [1, 0, 0]


@pytest.mark.smoke
def test_it_has_no_cotangent():
    @fcg.custom_vjp
    def op(x, state):
        return x

    op.defvjp(lambda x, state: (x, state), lambda state, g: (g, g))
    state = fcg.BackwardState(jnp.zeros(3))
    with pytest.raises(fcg.CotangentError, match=r"argument `state`.*write it.*and return None"):
        jax.grad(lambda x: op(x, state).sum())(x)


# Construction and copies.


@pytest.mark.parametrize("make", [nnx.eval_shape, lambda f: nnx.jit(f)()], ids=["shape", "jit"])
def test_made_inside_a_transformation_it_has_no_value(make):
    m = make(Watch)
    with pytest.raises(fcg.BackwardStateError, match=r"Watch.history.*has no value.*reset_"):
        m.history[...]
    assert fcg.backward_state(m)["history"] == jax.ShapeDtypeStruct((3,), jnp.float32)
    fcg.reset_backward_state(m)
    assert seen(m) == [0, 0, 0]


def test_a_jitted_constructor_makes_no_state_that_is_shared():
    make = nnx.jit(Watch)
    a, b = make(), make()
    for m in (a, b):
        fcg.reset_backward_state(m)
    nnx.grad(loss)(a, x)
    assert (seen(a), seen(b)) == ([1, 0, 0], [0, 0, 0])


def test_stacked_layers_have_none_until_they_share_one():
    stack = nnx.vmap(lambda _: Watch(), in_axes=0, out_axes=0)(jnp.arange(2))
    run = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    gradient = nnx.grad(lambda m, x: run(x, m).sum())
    with pytest.raises(fcg.BackwardStateError, match=r"nnx\.vmap"):
        gradient(stack, x)
    fcg.reset_backward_state(stack)
    gradient(stack, x)
    assert seen(stack) == [2, 1, 0]


def test_an_initial_value_of_a_trace_is_not_known():
    m = nnx.jit(lambda: Watch(jnp.zeros(3)))()
    with pytest.raises(fcg.BackwardStateError, match=r"history was computed inside.*NumPy"):
        fcg.reset_backward_state(m)
    with pytest.raises(fcg.BackwardStateError, match="reset_backward_state is called inside"):
        nnx.jit(fcg.reset_backward_state)(Watch())


def test_clones_share_and_deep_copies_do_not():
    m = Watch()
    clone, copied = nnx.clone(m), copy.deepcopy(m)
    nnx.grad(loss)(m, x)
    assert (seen(clone), seen(copied)) == ([1, 0, 0], [0, 0, 0])
    assert jax.tree.leaves(nnx.state(m))[0].shape == (3,)
    assert "history=Watch.history: float32[3]" in repr(m)


def test_an_optimizer_knows_nothing_of_it():
    m = Watch()
    optimizer = nnx.Optimizer(m, optax.sgd(0.1), wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(m, nnx.grad(loss)(m, x))
    assert seen(m) == [1, 1, 0]


# Checkpoints.


def model():
    return nnx.Sequential(Watch(), nnx.Linear(3, 3, rngs=nnx.Rngs(0)), Watch())


def test_orbax_brings_it_back(tmp_path):
    m = model()
    step = nnx.jit(nnx.grad(loss))
    step(m, x)
    saved = {"model": nnx.state(m), "backward": fcg.backward_state(m)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        abstract = nnx.eval_shape(model)
        target = {"model": nnx.state(abstract), "backward": fcg.backward_state(abstract)}
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    # Into an abstract model, and into one that runs already, whose compiled step goes on.
    other = model()
    step(other, 2 * x)
    for into in (abstract, other):
        nnx.update(into, restored["model"])
        fcg.load_backward_state(into, restored["backward"])
        assert seen(into.layers[0]) == seen(m.layers[0]) != [0, 0, 0]
        step(into, x)
    step(m, x)
    for into in (abstract, other):
        jax.tree.map(np.testing.assert_array_equal, *map(fcg.backward_state, (into, m)))


def test_values_have_to_fit():
    m = model()
    values = fcg.backward_state(m)
    del values["layers"][0]
    with pytest.raises(ValueError, match=r"layers.0.history is missing from the values"):
        fcg.load_backward_state(m, values)
    values = fcg.backward_state(m)
    values["layers"][1] = {"more": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"layers.1.more is no state of the model"):
        fcg.load_backward_state(m, values)
    values = {"layers": {"0": {"history": jnp.ones(3)}, "2": {"history": jnp.ones(4)}}}
    with pytest.raises(ValueError, match=r"layers.2.history has shape \(4,\); expected \(3,\)"):
        fcg.load_backward_state(m, values)
    assert seen(m.layers[0]) == [0, 0, 0]


def test_loading_may_move_it_to_a_mesh():
    m = Watch()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    everywhere = jax.NamedSharding(mesh, jax.P())
    step = nnx.jit(nnx.grad(loss))
    step(m, x)
    nnx.update(m, jax.device_put(nnx.state(m), everywhere))
    fcg.load_backward_state(m, jax.device_put(fcg.backward_state(m), everywhere))
    step(m, jax.device_put(jnp.ones((8, 3)), jax.NamedSharding(mesh, jax.P("data"))), 2.0)
    assert seen(m) == [2, 1, 0]
