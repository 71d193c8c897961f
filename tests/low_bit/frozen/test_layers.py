"""Layers with frozen weights: what they compute, train, keep and store."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import flax_customgrad as fcg

LAYERS = {
    "NF4Linear": (fcg.NF4Linear, {"block": 4}),
    "NF4Linear, scales in floats": (fcg.NF4Linear, {"block": 4, "double_quant": False}),
    "Int4Linear": (fcg.Int4Linear, {"block": 4}),
    "Int4Linear, zero points": (fcg.Int4Linear, {"block": None, "symmetric": False}),
    "QLoRALinear": (
        fcg.QLoRALinear,
        {"block": 4, "lora_rank": 2, "alpha": 3, "b_initializer": nnx.initializers.normal()},
    ),
}
each_layer = pytest.mark.parametrize(("cls", "kwargs"), LAYERS.values(), ids=LAYERS)
BIAS = {"bias_init": nnx.initializers.normal()}


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def made(cls, kwargs, **linear):
    return cls(7, 5, rngs=nnx.Rngs(0), **BIAS, **kwargs, **linear)


@each_layer
def test_it_computes_as_the_linear_layer_with_its_kernel(cls, kwargs):
    layer, x = made(cls, kwargs), normal(2, 3, 7)
    assert np.any(layer.bias)
    graphdef, state = nnx.split(layer)

    @jax.jit
    def both(state, x, one, integers):
        layer = nnx.merge(graphdef, state)
        plain = layer.to_layer()
        return layer(x), plain(x), layer(one), layer(integers), layer(x[:0])

    bad = x.copy()
    bad[0, 0, 0] = np.nan
    y, plain, one, integers, none = both(state, x, x[0, 0], np.ones((2, 7), np.int32))
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
    assert (one.shape, none.shape, integers.dtype) == ((5,), (0, 3, 5), jnp.float32)
    y, *_ = both(state, bad, x[0, 0], np.ones((2, 7), np.int32))
    assert np.isnan(np.asarray(y)[0, 0]).all()
    assert type(nnx.eval_shape(cls.to_layer, layer)) is fcg.Linear


@each_layer
def test_it_starts_as_the_linear_layer_of_nnx(cls, kwargs):
    layer, plain = made(cls, kwargs), nnx.Linear(7, 5, rngs=nnx.Rngs(0), **BIAS)
    again = cls.from_layer(plain, **{"rngs": nnx.Rngs(1), **kwargs})
    np.testing.assert_array_equal(layer.bias[...], plain.bias[...])
    np.testing.assert_array_equal(layer.kernel, again.kernel)
    np.testing.assert_allclose(layer.kernel, plain.kernel[...], atol=0.2)
    assert plain.kernel.dtype == jnp.float32
    assert not isinstance(layer, nnx.Linear)


@each_layer
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_those_of_nnx(cls, kwargs, dtype, param_dtype):
    def of(cls, kwargs, x):
        layer = cls(7, 5, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0), **kwargs)
        y, pull = jax.vjp(layer, x)
        return layer.kernel[...], y, *pull(y)

    for x in (jnp.ones((3, 7)), jnp.ones((3, 7), jnp.bfloat16)):
        ours, theirs = (
            nnx.eval_shape(lambda x, of=of, args=args: of(*args, x), x)
            for args in ((cls, kwargs), (nnx.Linear, {}))
        )
        assert [a.dtype for a in ours] == [a.dtype for a in theirs]


def test_the_gradient_of_qlora_by_its_formula():
    x, g = normal(2, 3, 7, dtype=np.float64), normal(2, 3, 5, dtype=np.float64)
    with jax.enable_x64(True):
        layer = made(*LAYERS["QLoRALinear"], param_dtype=jnp.float64, train_bias=True)
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

        @jax.jit
        def pulled_back(params, x, g):
            _, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params, rest)(x), params, x)
            return pull(g)

        grads, dx = pulled_back(params, x, g)
        w, a, b = map(np.asarray, (layer.kernel, layer.lora_a[...], layer.lora_b[...]))
        expected = {
            "lora_a": 1.5 * np.einsum("bti,bto,ro->ir", x, g, b),
            "lora_b": 1.5 * np.einsum("bti,ir,bto->ro", x, a, g),
            "bias": np.sum(g, (0, 1)),
        }
        assert set(grads) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(grads[name][...], value, rtol=1e-12)
        np.testing.assert_allclose(dx, g @ (w + 1.5 * a @ b).T, rtol=1e-12)


def test_autodiff_agrees_in_half_precision_and_on_what_is_constant():
    layer = made(fcg.Int4Linear, {"block": 4}, dtype=jnp.bfloat16)
    graphdef, scales, rest = nnx.split(layer, nnx.PathContains("scales"), ...)

    def gradient():
        def loss(scales, x):
            return jnp.sum(nnx.merge(graphdef, scales, rest)(x) ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))(scales, normal(4, 7, dtype=jnp.bfloat16))

    found, dx = gradient()
    with fcg.use_autodiff():
        expected, expected_dx = gradient()
    np.testing.assert_array_equal(dx, expected_dx)
    assert not np.any(found["scales"][...])
    assert not np.any(expected["scales"][...])


@each_layer
def test_what_is_trained(cls, kwargs):
    def names(**linear):
        return set(nnx.state(nnx.eval_shape(lambda: made(cls, kwargs, **linear)), nnx.Param))

    trained = {"lora_a", "lora_b"} if cls is fcg.QLoRALinear else set()
    assert names() == trained
    assert names(train_bias=True) == {*trained, "bias"}
    bare = nnx.eval_shape(lambda: made(cls, kwargs, use_bias=False))
    assert bare.bias is None
    assert set(nnx.state(bare, fcg.Frozen)) == set(bare.form.parts)


@pytest.mark.parametrize("graph", [True, False])
def test_qlora_trains_in_each_mode(graph):
    """As flax has it without updates of the graph: the parameters split off, and merged again."""
    layer, x = made(*LAYERS["QLoRALinear"]), normal(8, 7)
    before = nnx.to_pure_dict(nnx.state(layer, fcg.Frozen))
    graphdef, params, frozen = nnx.split(layer, nnx.LoRAParam, ..., graph=graph)

    @jax.jit
    def step(params):
        def loss(params):
            return jnp.mean((nnx.merge(graphdef, params, frozen)(x) - 1) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    values = []
    for _ in range(20):
        value, params = step(params)
        values.append(value)
    assert values[-1] < values[0] / 2
    after = nnx.to_pure_dict(nnx.state(nnx.merge(graphdef, params, frozen), fcg.Frozen))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_nnx_grad_sees_the_parameters_alone():
    layer = made(*LAYERS["QLoRALinear"])
    grads = nnx.jit(nnx.grad(lambda layer, x: layer(x).sum()))(layer, normal(8, 7))
    assert set(grads) == {"lora_a", "lora_b"}


@each_layer
def test_what_is_kept(cls, kwargs):
    """What is stored, and the input only where A needs it; no kernel in floats."""
    layer = made(cls, kwargs, dtype=jnp.bfloat16)
    graphdef, params, frozen = nnx.split(layer, nnx.Param, ...)
    found = fcg.residuals(
        lambda p, x: nnx.merge(graphdef, p, frozen)(x), params, jnp.ones((16, 7), jnp.bfloat16)
    )
    stored = {(v.shape, v.dtype) for v in jax.tree.leaves(frozen)}
    shapes = {(r.shape, r.dtype) for r in found if not r.is_argument}
    assert shapes <= stored
    assert ((16, 7) in {r.shape for r in found}) == (cls is fcg.QLoRALinear)


def test_a_scan_over_layers_keeps_codes():
    """Autodiff keeps eight kernels in floats."""
    n, depth = 128, 8
    make = nnx.vmap(lambda key: fcg.QLoRALinear(n, n, lora_rank=2, rngs=nnx.Rngs(key)))
    layers = nnx.eval_shape(lambda: make(jax.random.split(jax.random.key(0), depth)))
    graphdef, params, frozen = nnx.split(layers, nnx.Param, ...)

    def loss(params, x, frozen):
        def body(x, state):
            return jnp.tanh(nnx.merge(graphdef, *state)(x)), None

        return jnp.sum(jax.lax.scan(body, x, (params, frozen))[0])

    def temp():
        run = jax.jit(lambda *args: jax.grad(loss, (0, 1))(*args))
        compiled = run.lower(params, jnp.ones((4, n)), frozen).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    kernels = depth * n * n * 4
    assert temp() < kernels / 4
    with fcg.use_autodiff():
        assert temp() > kernels


def test_elsewhere_than_on_a_cpu_the_backward_dequantizes_after_the_gradient(monkeypatch):
    layer, x = made(*LAYERS["QLoRALinear"]), jnp.asarray(normal(4, 7))
    untraced = jax.make_user_context(default_value=False)

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(layer(x) ** 2))(x)

    assert "optimization_barrier" not in str(jax.make_jaxpr(gradient)(x))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with untraced(True):
        assert "optimization_barrier" in str(jax.make_jaxpr(gradient)(x))


@pytest.mark.parametrize("name", ["Int4Linear, zero points", "QLoRALinear"])
def test_a_checkpoint_has_all_of_it(name, tmp_path):
    cls, kwargs = LAYERS[name]
    layer = made(cls, kwargs)
    other = cls(7, 5, **kwargs, rngs=nnx.Rngs(1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.to_pure_dict(nnx.state(layer)))
        checkpointer.wait_until_finished()
        abstract = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(other)))
        restored = checkpointer.restore(tmp_path / "layer", abstract)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(other, state)
    run = nnx.jit(lambda layer, x: layer(x))
    np.testing.assert_array_equal(run(other, normal(3, 7)), run(layer, normal(3, 7)))


def test_to_layer_and_convert():
    model = nnx.Sequential(
        nnx.Linear(7, 7, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(7, 7, rngs=nnx.Rngs(1))
    )
    run, x = nnx.jit(lambda model, x: model(x)), normal(3, 7)
    before = np.asarray(run(model, x))
    model = fcg.convert(model, rules={nnx.Linear: fcg.Int4Linear})
    assert {type(layer) for layer in (model.layers[0], model.layers[2])} == {fcg.Int4Linear}
    after = np.asarray(run(model, x))
    np.testing.assert_allclose(after, before, atol=0.3)
    model = fcg.convert(model, rules={fcg.Int4Linear: fcg.Int4Linear.to_layer})
    np.testing.assert_allclose(run(model, x), after, rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
def test_it_is_made_without_values():
    made = nnx.eval_shape(lambda: fcg.NF4Linear(70, 5, rngs=nnx.Rngs(0)))
    assert made.codes.shape == (70, 3)
    assert made.scales.shape == (2, 5)


def test_arguments_that_cannot_be():
    rngs = nnx.Rngs(0)
    for block in (0, -1, 2.0, None):
        with pytest.raises(ValueError, match=f"NF4Linear: block={block!r} must be an integer"):
            fcg.NF4Linear(4, 4, block=block, rngs=rngs)
    with pytest.raises(ValueError, match="Int4Linear: block=0 must be an integer of at least 1"):
        fcg.Int4Linear(4, 4, block=0, rngs=rngs)
    with pytest.raises(
        ValueError, match="QLoRALinear: lora_rank=0 must be an integer of at least 1"
    ):
        fcg.QLoRALinear(4, 4, lora_rank=0, rngs=rngs)
    with pytest.raises(
        ValueError, match="NF4Linear computes its product itself and cannot call `dot_general`"
    ):
        fcg.NF4Linear(4, 4, dot_general=jax.lax.dot, rngs=rngs)
    plain = nnx.Linear(4, 4, promote_dtype=lambda *args, **_: args, rngs=rngs)
    with pytest.raises(
        ValueError, match="Int4Linear computes its product itself and cannot call `promote_dtype`"
    ):
        fcg.Int4Linear.from_layer(plain)
    plain = nnx.Linear(4, 4, kernel_init=nnx.initializers.constant(jnp.nan), rngs=rngs)
    with pytest.raises(ValueError, match="Int4Linear: 16 of 16 weights are infinite or NaN"):
        fcg.Int4Linear.from_layer(plain)
    with pytest.raises(TypeError, match=r"NF4Linear.from_layer takes an nnx.Linear"):
        fcg.NF4Linear.from_layer(nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs))
