"""The binding: the written backward in whatever way JAX differentiates, by a primitive or without.

The backward here is 10 times too large, so that it shows which derivative was taken.
"""

import gc
import sys
import threading
import weakref

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

import flax_customgrad as fcg
from flax_customgrad.contract import binding, compat

W = jnp.array([[0.5, -1.0, 2.0], [1.5, 0.3, -0.7], [0.2, 0.8, -0.4]])
X = jnp.array([[0.1, -0.2, 0.4], [1.0, 0.5, -0.6]])


def plain(w, x):
    return jnp.tanh(x @ w)


def make(factor=10.0, **kwargs):
    op = fcg.custom_vjp(plain, **kwargs)

    def fwd(w, x):
        y = checkpoint_name(op(w, x), "y")
        return y, (w, x, y)

    def bwd(res, g):
        w, x, y = res
        h = factor * g * (1 - y * y)
        dw = jnp.einsum("...i,...o->io", x, h, precision="highest")
        return dw, jnp.matmul(h, w.T, precision="highest")

    op.defvjp(fwd, bwd)
    return op


@pytest.fixture(params=[True, False], ids=["primitive", "custom_vjp"], autouse=True)
def has_primitives(request, monkeypatch):
    if request.param and not binding.HAS_PRIMITIVES:
        pytest.skip("this JAX has no such primitives")
    monkeypatch.setattr(binding, "HAS_PRIMITIVES", request.param)
    return request.param


def layers(op):
    """Three layers in a scan, so that residuals are stacked up."""

    def loss(w, x):
        return jax.lax.scan(lambda x, _: (op(w, x), None), x, None, length=3)[0].sum()

    return loss


def written(w, x):
    """Three times the derivative of the scan, each time ten times as large."""

    @jax.custom_vjp
    def op(w, x):
        return plain(w, x)

    def fwd(w, x):
        y, pullback = jax.vjp(plain, w, x)
        return y, pullback

    op.defvjp(fwd, lambda pullback, g: jax.tree.map(lambda a: 10 * a, pullback(g)))
    return jax.grad(layers(op), (0, 1))(w, x)


def assert_same(got, want, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, 1e-5), got, want)


policies = jax.checkpoint_policies
REVERSE = {
    "eager": lambda loss: jax.grad(loss, (0, 1))(W, X),
    "jit": lambda loss: jax.jit(jax.grad(loss, (0, 1)))(W, X),
    "ahead of time": lambda loss: jax.jit(jax.grad(loss, (0, 1))).lower(W, X).compile()(W, X),
    "checkpoint": lambda loss: jax.grad(jax.checkpoint(loss), (0, 1))(W, X),
    "checkpoint, names": lambda loss: jax.grad(
        jax.checkpoint(loss, policy=policies.save_only_these_names("y")), (0, 1)
    )(W, X),
    "checkpoint, dots": lambda loss: jax.grad(
        jax.checkpoint(loss, policy=policies.dots_saveable), (0, 1)
    )(W, X),
    "checkpoint, offload": lambda loss: jax.jit(
        jax.grad(
            jax.checkpoint(
                loss,
                policy=policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=["y"],
                    offload_src="device",
                    offload_dst="pinned_host",
                ),
            ),
            (0, 1),
        )
    )(W, X),
    "vjp": lambda loss: jax.vjp(loss, W, X)[1](1.0),
    "linearize, transposed": lambda loss: jax.linear_transpose(jax.linearize(loss, W, X)[1], W, X)(
        1.0
    ),
    "pmap": lambda loss: jax.tree.map(
        lambda a: a[0],
        jax.pmap(jax.grad(loss, (0, 1)), in_axes=(None, 0), devices=jax.devices()[:1])(W, X[None]),
    ),
    "export": lambda loss: jax.export.deserialize(
        jax.export.export(jax.jit(jax.grad(loss, (0, 1))))(W, X).serialize()
    ).call(W, X),
}


@pytest.mark.parametrize("name", REVERSE)
def test_reverse_mode_takes_the_written_backward(name, has_primitives):
    if name == "linearize, transposed" and not has_primitives:
        pytest.skip("jax.custom_vjp has no linearization but its own")
    assert_same(REVERSE[name](layers(make())), written(W, X))


@pytest.mark.parametrize("flag", ["jax_custom_vjp3", "jax_remat3"])
def test_flags_of_jax(flag, has_primitives):
    if flag == "jax_custom_vjp3" and not has_primitives:
        pytest.skip("jax.custom_vjp fails under jax.checkpoint with this flag")
    jax.config.update(flag, True)
    try:
        assert_same(jax.grad(layers(make()), (0, 1))(W, X), written(W, X))
        loss = jax.checkpoint(layers(make()))
        assert_same(jax.jit(jax.grad(loss, (0, 1)))(W, X), written(W, X))
    finally:
        jax.config.update(flag, False)


def test_gradients_accumulate_in_references():
    dw, dx = jax.new_ref(jnp.ones_like(W)), jax.new_ref(jnp.ones_like(X))
    _, pullback = jax.vjp(layers(make()), W, X)
    pullback.with_refs(dw, dx)(1.0)
    assert_same((dw[...] - 1, dx[...] - 1), written(W, X))


def test_two_threads():
    op, got = make(), {}
    loss = layers(op)

    def run(i):
        got[i] = jax.grad(loss, (0, 1))(W * i, X)

    threads = [threading.Thread(target=run, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (1, 2):
        assert_same(got[i], written(W * i, X))


def test_what_jax_maps_over_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = PartitionSpec("data")

    def total(w, x):
        loss = lambda w, x: layers(make())(w, x)[None]  # noqa: E731
        return jax.shard_map(loss, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split)(
            w, x
        ).sum()

    assert_same(jax.grad(total, (0, 1))(W, X), written(W, X))


@pytest.mark.parametrize("leading_axes", [True, False])
@pytest.mark.parametrize("axes", [(None, 1), (0, 1), (0, None)])
def test_vmap(axes, leading_axes):
    op = make(leading_axes=leading_axes)
    w = W if axes[0] is None else jnp.stack([W, 2 * W, W + 1, W])
    x = X if axes[1] is None else jnp.stack([X, 2 * X, X - 1, X], axis=1)

    def loss(op):
        return lambda w, x: jnp.sum(jnp.sin(jax.vmap(op, axes)(w, x)))

    got = jax.jit(jax.grad(loss(op), (0, 1)))(w, x)
    assert_same(got, jax.tree.map(lambda a: 10 * a, jax.grad(loss(plain), (0, 1))(w, x)), 1e-4)
    per_example = jax.vmap(jax.grad(lambda w, x: op(w, x).sum()), axes)(w, x)
    want = jax.vmap(jax.grad(lambda w, x: plain(w, x).sum()), axes)(w, x)
    assert_same(per_example, 10 * want, 1e-4)


# Forward mode.


FORWARD = {
    "jvp": lambda f: jax.jvp(f, (W, X), (X.T @ X, X)),
    "jit of jvp": lambda f: jax.jit(lambda *t: jax.jvp(f, (W, X), t))(X.T @ X, X),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1))(W, X),
    "linearize": lambda f: jax.linearize(f, W, X)[1](X.T @ X, X),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f))(W, X),
    "vmap of jvp": lambda f: jax.vmap(lambda x: jax.jvp(lambda w: f(w, x), (W,), (W,)))(X),
}
SECOND = {
    "hessian": lambda f: jax.jit(jax.hessian(f))(W, X),
    "reverse over forward": lambda f: jax.grad(lambda w: jax.jvp(f, (w, X), (W, X))[1])(W),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f))(W, X),
    "checkpoint, forward over reverse": lambda f: jax.hessian(jax.checkpoint(f))(W, X),
    "reverse over forward over forward": lambda f: jax.grad(
        lambda w: jax.jvp(lambda w: jax.jvp(f, (w, X), (W, X))[1], (w,), (W,))[1]
    )(W),
}


@pytest.fixture(name="primitive")
def only_by_primitive(has_primitives):
    if not has_primitives:
        pytest.skip("jax.custom_vjp has no forward mode")


@pytest.mark.parametrize("name", FORWARD | SECOND)
def test_forward_mode(name, primitive):
    with jax.enable_x64(True):
        run = (FORWARD | SECOND)[name]
        loss = layers(make(factor=1.0))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 1e-6),
            run(loss),
            run(layers(plain)),
        )


def _steps(x, keeps):
    """s_t = tanh(s_{t-1} x_t), and for a backward the states before and after each step."""

    def step(s, a):
        t = jnp.tanh(s * a)
        return t, (t, (s, t) if keeps else ())

    return jax.lax.scan(step, jnp.ones(x.shape[1:]), x)[1]


@fcg.custom_vjp
def stepped(x):
    return _steps(x, keeps=False)[0]


def stepped_fwd(x):
    y, kept = _steps(x, keeps=True)
    return y, (x, kept)


def stepped_bwd(res, g):
    def back(ds, xs):
        g, a, s, t = xs
        du = (ds + g) * (1 - t * t)
        return du * a, du * s

    x, kept = res
    return (jax.lax.scan(back, jnp.zeros_like(x[0]), (g, x, *kept), reverse=True)[1],)


stepped.defvjp(stepped_fwd, stepped_bwd)

WEIGHTS = jnp.cos(jnp.arange(6.0)).reshape(3, 2)


def _grad(f):
    return lambda x: jnp.sum(WEIGHTS * jax.grad(f)(x))


def _along(f):
    return lambda x: jax.jvp(f, (x,), (WEIGHTS,))[1]


COMPOSITIONS = {
    "grad of grad": lambda f: _grad(_grad(f)),
    "grad of jvp": lambda f: _grad(_along(f)),
    "grad of grad of jvp": lambda f: _grad(_grad(_along(f))),
    "grad of checkpointed grad": lambda f: _grad(jax.checkpoint(_grad(f))),
    "grad of grad of a checkpoint": lambda f: _grad(_grad(jax.checkpoint(f))),
    "grad of a checkpointed jvp": lambda f: _grad(jax.checkpoint(_along(f))),
    "jvp of grad of a checkpoint": lambda f: _along(_grad(jax.checkpoint(f))),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_orders_and_checkpoints_compose_where_the_forward_scans(name, primitive):
    """What is kept is stacked by a scan, and has a derivative of its own once it is transposed."""
    x = jnp.linspace(0.3, 1.4, 6).reshape(3, 2)

    def result(function):
        return COMPOSITIONS[name](lambda x: jnp.sum(WEIGHTS * function(x) ** 2))(x)

    expected = result(lambda x: _steps(x, keeps=False)[0])
    np.testing.assert_allclose(result(stepped), expected, rtol=1e-4)


def test_forward_mode_is_the_derivative_of_the_function(primitive):
    _, tangent = jax.jvp(make(), (W, X), (W, X))
    np.testing.assert_array_equal(tangent, jax.jvp(plain, (W, X), (W, X))[1])


def test_forward_mode_of_a_surrogate_is_the_transpose_of_its_backward(primitive):
    _, tangent = jax.jvp(make(surrogate=True), (W, X), (W, X))
    np.testing.assert_allclose(tangent, 10 * jax.jvp(plain, (W, X), (W, X))[1], 1e-5)
    second = jax.grad(lambda x: jax.jvp(fcg.round_ste, (x,), (x,))[1].sum())(X)
    np.testing.assert_array_equal(second, jnp.ones_like(X))


def test_a_surrogate_that_is_not_linear_says_so(primitive):
    with pytest.raises(TypeError, match="`clip_cotangent_by_value` has no forward mode"):
        jax.jvp(lambda x: fcg.gradient_clip(x, max_value=1.0), (X,), (X,))


def test_a_converted_model(has_primitives):
    def made():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.tanh, nnx.LayerNorm(4, rngs=rngs))

    model = fcg.convert(made())
    if has_primitives:  # the library's own operations are bound by one
        laplacian = lambda m: jnp.trace(jax.hessian(lambda x: m(x).sum())(X[0]))  # noqa: E731
        got, want = (nnx.jit(nnx.grad(laplacian))(m) for m in (model, made()))
        assert_same(got, want, 1e-3)


def test_without_primitives_forward_mode_says_what_to_do(has_primitives):
    if not has_primitives:
        with pytest.raises(TypeError, match="forward-mode") as caught:
            jax.jvp(make(), (W, X), (W, X))
        assert "use_autodiff" in caught.value.__notes__[0]


# What an operation costs.


def test_a_primal_closes_over_values_of_a_trace():
    @jax.jit
    def run(scale, x):
        op = fcg.custom_vjp(lambda x: scale * x)
        op.defvjp(lambda x: (scale * x, None), lambda res, g: (scale * g,))
        return jax.value_and_grad(lambda x: op(x).sum())(x)

    value, grad = run(3.0, jnp.ones(2))
    assert value == 6
    np.testing.assert_array_equal(grad, [3, 3])


def test_a_primal_branches_in_python_on_a_value():
    @fcg.custom_vjp
    def op(x):
        return jnp.sin(x) if x > 0 else jnp.cos(x)

    op.defvjp(lambda x: (op(x), x), lambda x, g: (10 * g * x,))
    assert jax.value_and_grad(op)(2.0) == (jnp.sin(2.0), 20)
    assert jax.value_and_grad(op)(-2.0) == (jnp.cos(-2.0), -20)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(jax.grad(op))(2.0)


def test_an_operation_of_the_library_is_traced_once_for_arguments_of_a_kind(primitive, monkeypatch):
    traced = []
    monkeypatch.setattr(
        jax, "make_jaxpr", lambda f, make=jax.make_jaxpr, **kw: traced.append(f) or make(f, **kw)
    )
    layer = fcg.Linear(7, 7, rngs=nnx.Rngs(0))
    jax.jit(lambda x: layer(layer(layer(x)))).lower(jnp.ones((2, 7)))
    assert len(traced) == 1


def test_a_compiled_function_is_called_without_python(primitive):
    layer = fcg.Linear(7, 7, rngs=nnx.Rngs(0))
    function, x = jax.jit(lambda x: fcg.gelu(layer(x))), jnp.ones((2, 7))
    function(x)
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code) if event == "call" else None)
    try:
        function(x)
    finally:
        sys.setprofile(None)
    assert not calls


def test_outside_of_a_trace_a_call_is_one_program_unless_it_has_a_rate(primitive):
    calls = []

    def rule(static, x):
        calls.append(compat.is_traced(x))
        return 2 * x

    rules = binding.Rules(
        "twice", rule, rule, rule, is_pure=True, has_rate=lambda rate: isinstance(rate, float)
    )
    op = binding.bind(rules)
    for static in (1, 1, 0.5, 0.5):
        np.testing.assert_array_equal(op(static, X), 2 * X)
    assert calls == [True, False, False]


def test_programs_of_static_values_that_come_no_more_are_freed(primitive, monkeypatch):
    monkeypatch.setattr(binding, "_KEPT_PROGRAMS", 2)

    class Slope:
        pass

    def rule(static, x):
        return 2 * x

    rules = binding.Rules("twice", primal=rule, forward=rule, backward=rule, is_pure=True)
    op, slopes = binding.bind(rules), [Slope() for _ in range(4)]
    alive = [weakref.ref(slope) for slope in slopes]
    while slopes:
        op(slopes.pop(0), X)
    gc.collect()
    assert [slope() is None for slope in alive] == [True, True, False, False]


@pytest.mark.parametrize("policy", [None, policies.save_only_these_names("y")])
def test_forward_mode_costs_a_backward_nothing(policy, primitive, monkeypatch):
    def costs():
        loss = jax.checkpoint(layers(make()), policy=policy)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(W, X).compile()
        cost = compiled.cost_analysis()
        return cost["flops"], cost["transcendentals"], compiled.memory_analysis().temp_size_in_bytes

    ours = costs()
    monkeypatch.setattr(binding, "HAS_PRIMITIVES", False)
    assert ours == costs()
