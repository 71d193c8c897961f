"""A parameter that a Module holds at several paths is one; its gradients are added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


class Tied(nnx.Module):
    """One parameter under two names, and one submodule under two names."""

    def __init__(self):
        self.down = nnx.Param(jnp.arange(1.0, 4.0))
        self.up = self.down
        self.encoder = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0))
        self.layers = nnx.List([self.encoder])


def fun(m, x):
    return (x * m.down) @ m.layers[0].kernel * m.up


def partial_derivatives(res, g):
    m, x = res
    kernel = m.encoder.kernel[...]
    h = g * m.up
    grads = {
        "down": ((h @ kernel.T) * x).sum(0),
        "up": (g * ((x * m.down) @ kernel)).sum(0),
        "kernel": (x * m.down).T @ h,
    }
    return grads, (h @ kernel.T) * m.down


def at_both_paths(res, g):
    grads, dx = partial_derivatives(res, g)
    kernel = {"kernel": grads["kernel"]}
    return {"down": grads["down"], "up": grads["up"], "encoder": kernel}, dx


def at_one_path(res, g):
    grads, dx = partial_derivatives(res, g)
    kernel = {0: {"kernel": grads["kernel"]}}
    return {"up": grads["down"] + grads["up"], "layers": kernel}, dx


MODES = {
    "graph_updates": lambda loss, m: nnx.state(nnx.grad(loss)(m)),
    "graph": lambda loss, m: nnx.state(
        nnx.grad(loss, graph=True, graph_updates=False)(m), graph=True
    ),
    "jit": lambda loss, m: nnx.state(nnx.jit(nnx.grad(loss))(m)),
    "split": lambda loss, m: jax.grad(lambda s: loss(nnx.merge(nnx.graphdef(m), s)))(nnx.state(m)),
    "scan": lambda loss, m: jax.grad(
        lambda s: jax.lax.scan(
            lambda c, _: (c + loss(nnx.merge(nnx.graphdef(m), s)), None), 0.0, None, 1
        )[0]
    )(nnx.state(m)),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("bwd", [at_both_paths, at_one_path])
def test_gradients_at_several_paths_are_added(bwd, mode):
    op = fcg.custom_vjp(fun)
    op.defvjp(lambda m, x: (fun(m, x), (m, x)), bwd)
    m, x = Tied(), jnp.arange(6.0).reshape(2, 3)
    ours, theirs = (mode(lambda m, f=f: jnp.sin(f(m, x)).sum(), m) for f in (op, fun))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_a_shared_parameter_is_missed_at_its_first_path():
    op = fcg.custom_vjp(fun)
    op.defvjp(lambda m, x: (fun(m, x), (m, x)), lambda res, g: ({"down": None}, None))
    with pytest.raises(fcg.CotangentError) as caught:
        nnx.grad(lambda m: op(m, jnp.ones((2, 3))).sum())(Tied())
    assert "misses the parameter 'encoder.kernel'" in str(caught.value)
    assert "nnx.State({'down': ..., 'encoder': {'kernel': ...}})" in str(caught.value)


def test_a_module_that_knows_its_parent_has_finitely_many_paths():
    class Child(nnx.Module):
        def __init__(self, parent):
            self.parent = parent

    class Parent(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3))
            self.child = Child(self)

    op = fcg.custom_vjp(lambda m, x: m.w * x)
    op.defvjp(lambda m, x: (m.w * x, x), lambda x, g: ({"child": {"parent": {"w": g * x}}}, None))
    grads = nnx.grad(lambda m: op(m, jnp.full(3, 2.0)).sum())(Parent())
    np.testing.assert_array_equal(grads["w"][...], 2)
