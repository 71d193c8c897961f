"""Fp8Linear and Fp8Einsum: codes, scales, histories, and the gradients in E5M2."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.linen import fp8_ops
from jax import lax

import flax_customgrad as fcg
from flax_customgrad.contract.residuals import residuals
from flax_customgrad.low_bit.fp8.fp8_codes import (
    FORWARD_DTYPE,
    GRADIENT_DTYPE,
    encode_fp8,
    finite_amax,
    largest_of,
    scale_from_amax,
)

ONE = np.float32(1)
MODES = ({}, {"graph_updates": False}, {"graph": False})


def made(**kwargs):
    kwargs = {"history": 3, **kwargs}
    return fcg.Fp8Linear(4, 3, rngs=nnx.Rngs(0), **kwargs)


def batch(step):
    normal = np.random.default_rng(step).standard_normal((8, 4), np.float32)
    return np.float32(1 + step % 3) * normal


def loss(layer, x):
    return jnp.sum(jnp.sin(layer(x)) * jnp.arange(1.0, 4))


gradient = nnx.jit(nnx.grad(loss))


@pytest.fixture(scope="module")
def shared():
    """One layer for many tests: each layer's states are its own, and compile anew."""
    return made()


@pytest.fixture
def layer(shared):
    fcg.reset_backward_state(shared)
    return shared


@jax.jit
def codes_and_amax(x):
    codes = [encode_fp8(x, ONE, dtype) for dtype in (FORWARD_DTYPE, GRADIENT_DTYPE)]
    return codes, finite_amax(x)


# Codes.


encode = partial(jax.jit, static_argnums=2)(encode_fp8)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [FORWARD_DTYPE, GRADIENT_DTYPE])
def test_codes_at_every_value_tie_and_bound(dtype):
    dtype = np.dtype(dtype)
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2
    beyond = values[-1] * np.array([1.01, 1.1, 2, 1e20])
    x = np.concatenate([values, ties, ties * (1 + 1e-6), ties * (1 - 1e-6), beyond, -beyond])
    expected = np.clip(x.astype(np.float32), values[0], values[-1]).astype(dtype)
    codes = encode(np.float32(x), ONE, dtype)
    assert codes.dtype == dtype
    np.testing.assert_array_equal(np.asarray(codes).view(np.uint8), expected.view(np.uint8))
    with jax.enable_x64(True):
        wide = np.asarray(encode(np.append(x, 1e300), ONE, dtype))
    np.testing.assert_array_equal(wide[:-1].view(np.uint8), expected.view(np.uint8))
    assert float(wide[-1]) == values[-1] == largest_of(dtype)


def test_what_is_not_finite_has_no_finite_code():
    codes, amax = codes_and_amax(np.float32([np.inf, -np.inf, np.nan, -2.0]))
    for a in codes:
        assert not np.isfinite(np.float32(a)[:3]).any()
    assert amax == 2
    assert codes_and_amax(np.float32([np.nan] * 4))[1] == 0
    assert codes_and_amax(np.zeros((0, 3), np.float32))[1] == 0


@pytest.mark.smoke
def test_a_scale_is_positive_and_finite():
    most = np.finfo(np.float32).max
    amax = np.float32([7, 0, np.inf, np.nan, 1e-37, most])
    scales = np.asarray(jax.jit(lambda a: scale_from_amax(a, 448.0, jnp.float32(5), 1))(amax))
    np.testing.assert_allclose(scales[0], 7 / 224, rtol=1e-6)
    np.testing.assert_array_equal(scales[1:4], 5)
    assert scales[4] == np.finfo(np.float32).tiny
    assert np.isfinite(scales[5])


# Delayed scaling, beside flax.linen.

NAMES = ("input", "kernel", "output_grad")


def of_linen(layer):
    """The operation of flax.linen, and its state as `layer` has it."""
    op = fp8_ops.Fp8DirectDotGeneralOp(amax_history_length=layer.delayed.amax_history.shape[1])
    history, scale = layer.delayed.amax_history[...], layer.delayed.scale[...]
    state = {}
    for i, name in enumerate(NAMES):
        state[f"{name}_amax_history"] = history[i]
        state[f"{name}_scale"] = scale[i : i + 1]
    return op, state


def linen_gradient(op):
    """A function to output, gradients and the next state; two calls share their state."""
    numbers = (((1,), (0,)), ((), ()))

    def objective(state, params, calls):
        def layer(x):
            y = op.apply({fp8_ops.OVERWRITE_WITH_GRADIENT: state}, x, params["kernel"], numbers)
            return y + params["bias"]

        return sum(loss(layer, x) for x in calls)

    def in_dtype(state, dtype):
        return jax.tree.map(lambda a: lax.convert_element_type(a, dtype), state)

    @jax.jit
    def gradient(state, params, calls):
        # In this dtype a sum of two states is their maximum.
        of_all = jax.grad(objective, (0, 1, 2), allow_int=True)
        state, params, calls = of_all(in_dtype(state, fp8_ops.fm32), params, calls)
        return in_dtype(state, jnp.float32), params, calls

    return gradient


def assert_same_state(layer, state):
    for i, name in enumerate(NAMES):
        np.testing.assert_array_equal(
            layer.delayed.amax_history[i], state[f"{name}_amax_history"], name
        )
        np.testing.assert_array_equal(layer.delayed.scale[i : i + 1], state[f"{name}_scale"], name)


def test_steps_are_those_of_flax_linen():
    layer = made()
    layer.bias[...] = np.arange(3, dtype=np.float32)
    op, state = of_linen(layer)
    theirs = linen_gradient(op)
    params = {"kernel": np.asarray(layer.kernel[...]), "bias": np.asarray(layer.bias[...])}
    ours = nnx.jit(nnx.grad(lambda l, xs: sum(loss(l, x) for x in xs), argnums=(0, 1)))
    for step in range(5):
        xs = [batch(step), batch(step + 7)]
        state, expected, expected_dxs = theirs(state, params, xs)
        grads, dxs = ours(layer, xs)
        assert_same_state(layer, state)
        for name in params:
            np.testing.assert_allclose(grads[name][...], expected[name], rtol=2e-6, atol=2e-6)
        for dx, e in zip(dxs, expected_dxs, strict=True):
            np.testing.assert_allclose(dx, e, rtol=2e-6, atol=2e-6)
        params = {name: p - np.float32(0.1) * expected[name] for name, p in params.items()}
        nnx.update(layer, {name: jnp.asarray(p) for name, p in params.items()})
    assert layer.delayed.steps[...].tolist() == [5, -1]


def test_micro_batches_leave_the_histories_of_the_whole_batch(layer):
    whole, parts, scanned = layer, made(), made()

    @nnx.jit
    def accumulated(layer, x):
        fcg.begin_step(layer)
        graphdef, params = nnx.split(layer)

        def add(total, x):
            grads = jax.grad(lambda p: loss(nnx.merge(graphdef, p), x))(params)
            return jax.tree.map(jnp.add, total, grads), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, params), x)[0]

    for step in range(5):
        x = batch(step)
        expected = gradient(whole, x)
        fcg.begin_step(parts)
        grads = [gradient(parts, micro) for micro in x.reshape(4, 2, 4)]
        for total in (
            jax.tree.map(lambda *g: sum(map(np.asarray, g)), *grads),
            accumulated(scanned, x.reshape(4, 2, 4)),
        ):
            np.testing.assert_allclose(total.kernel[...], expected.kernel[...], rtol=1e-5)
        for layer in (parts, scanned):
            for name in ("amax_history", "scale"):
                state = getattr(layer.delayed, name)[...]
                np.testing.assert_array_equal(state, getattr(whole.delayed, name)[...])
    assert parts.delayed.steps[...].tolist() == [5, 5]


def test_an_evaluation_writes_nothing(layer):
    gradient(layer, batch(0))
    before = jax.tree.map(np.asarray, fcg.backward_state(layer))
    y = jax.jit(layer)(batch(1))
    np.testing.assert_allclose(jax.jit(jax.vmap(layer))(batch(1)), y, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, before, fcg.backward_state(layer))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_modes_of_nnx(layer, mode):
    expected = gradient(layer, batch(1))
    assert layer.delayed.amax_history[0, 0] == np.abs(batch(1)).max()
    _, state = of_linen(layer)
    fcg.reset_backward_state(layer)
    grads = nnx.jit(nnx.grad(nnx.remat(loss, **mode), **mode), **mode)(layer, batch(1))
    np.testing.assert_allclose(grads.kernel[...], expected.kernel[...], rtol=1e-6)
    assert_same_state(layer, state)


def test_calls_in_a_scan_are_one_step(layer):
    xs = np.stack([batch(0), batch(1)])
    nnx.jit(nnx.grad(lambda m, xs: sum(loss(m, x) for x in xs)))(layer, xs)
    _, state = of_linen(layer)
    fcg.reset_backward_state(layer)
    nnx.jit(nnx.grad(lambda m, xs: lax.map(lambda x: loss(m, x), xs).sum()))(layer, xs)
    assert_same_state(layer, state)
    assert layer.delayed.steps[0] == 1


def test_a_gradient_under_vmap_is_refused(layer):
    with pytest.raises(fcg.BackwardStateError, match=r"Fp8Linear's amax_history: .*under jax.vmap"):
        jax.jit(jax.vmap(jax.grad(lambda x: layer(x).sum())))(batch(0))


def test_on_a_mesh(layer):
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=explicit)
    expected = gradient(layer, batch(0))
    with jax.set_mesh(mesh):
        spread = made()
        grads = gradient(spread, jax.device_put(batch(0), jax.P("data")))
        np.testing.assert_allclose(grads.kernel[...], expected.kernel[...], rtol=1e-5)
        history = np.asarray(spread.delayed.amax_history[...])
    np.testing.assert_allclose(history, layer.delayed.amax_history[...], rtol=1e-6)


# What is kept, and in what.


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_byte_an_element_is_kept(dtype):
    layer = made(dtype=dtype)
    x = jnp.ones((64, 4), dtype)
    graphdef, params = nnx.split(layer)
    kept = [
        r for r in residuals(lambda p, x: nnx.merge(graphdef, p)(x), params, x) if not r.is_argument
    ]
    assert sorted((r.shape, str(r.dtype)) for r in kept if r.nbytes > 12) == [((64, 4), "uint8")]
    assert sum(r.nbytes for r in kept) == 64 * 4 + 24


@pytest.mark.parametrize(("dtype", "scaling"), [("bfloat16", "delayed"), ("float16", "current")])
def test_half_precision(dtype, scaling):
    half, single = (made(scaling=scaling, dtype=d, param_dtype=dtype) for d in (dtype, "float32"))

    @jax.jit
    def pulled(x, g):
        y, pull = jax.vjp(half, x)
        wide, pull_wide = jax.vjp(single, x.astype(jnp.float32))
        return (y, *pull(g)), (wide, *pull_wide(g.astype(jnp.float32)))

    for step in range(2):
        x = batch(step).astype(jnp.dtype(dtype))
        # Nearly the largest that float16 has, and so that its products are beyond.
        g = np.broadcast_to(np.float32([1, 6e4, 1]), (8, 3)).astype(jnp.dtype(dtype))
        for got, expected in zip(*pulled(x, g), strict=True):
            assert got.dtype == dtype
            np.testing.assert_allclose(np.float32(got), expected, rtol=2 ** (-7))


def test_out_dtype():
    x = jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)
    layer = made(dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    assert jax.eval_shape(layer, x).dtype == jnp.float32
    assert jax.eval_shape(made(), x).dtype == jnp.float32


# Extreme values.


def pulled_through(layer):
    """The output, and the gradient of the input, of an input and a cotangent."""

    @jax.jit
    def pulled(x, g):
        y, pull = jax.vjp(layer, x)
        return y, *pull(g)

    return pulled


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_what_is_not_finite_stays_so_and_is_not_remembered(scaling):
    layer = made(scaling=scaling)
    pulled = pulled_through(layer)
    for bad in (jnp.inf, jnp.nan):
        x, g = batch(1), np.ones((8, 3), np.float32)
        x[2, 1], g[3, 0] = bad, bad
        y, dx = map(np.asarray, pulled(x, g))
        assert not np.isfinite(y[2]).any()
        assert np.isfinite(np.delete(y, 2, 0)).all()
        assert not np.isfinite(dx[3]).any()
        assert np.isfinite(np.delete(dx, 3, 0)).all()
        if scaling == "delayed":
            assert np.isfinite(layer.delayed.amax_history[...]).all()
            assert layer.delayed.amax_history[2, 0] == 1
    assert all(np.isfinite(a).all() for a in pulled(batch(2), np.ones((8, 3), np.float32)))


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_extreme_values(scaling):
    layer = made(scaling=scaling)
    pulled = pulled_through(layer)
    for size in (0.0, 1e-38, 1e-30, 3e38):
        fcg.reset_backward_state(layer)
        x = np.full((8, 4), size, np.float32)
        x[0, 0] *= -0.5
        for _ in range(2):
            y, dx = pulled(x, np.full((8, 3), size, np.float32))
            assert not np.isnan(y).any()
            assert not np.isnan(dx).any()
        # Smaller results are subnormal, and flushed to zero.
        if size in (0.0, 1e-30):
            exact = x @ np.asarray(layer.kernel[...])
            np.testing.assert_allclose(y, exact, rtol=0.2, atol=0.1 * size)


def test_empty_batches(layer):
    grads = gradient(layer, np.ones((0, 4), np.float32))
    assert not np.asarray(grads.kernel[...]).any()
    assert not np.asarray(layer.delayed.amax_history[0]).any()
    for shape in ((2, 0, 4), (4,)):
        assert jax.eval_shape(layer, jnp.ones(shape)).shape == (*shape[:-1], 3)


def test_margin_leaves_room():
    layer = made(margin=3)
    for _ in range(2):
        gradient(layer, batch(0))
    largest = np.abs(batch(0)).max()
    np.testing.assert_allclose(layer.delayed.scale[0], largest / 448 * 8, rtol=1e-6)
    x, kernel = 8 * batch(0), np.asarray(layer.kernel[...])
    np.testing.assert_allclose(jax.jit(layer)(x), x @ kernel, atol=2)


# Other layers, and errors.

EQUATIONS = [
    ("nta,hab->nthb", (8, 2, 4), (8, 4), (3, 5, 2)),
    ("...a,ac->...", (3, 2), None, (2, 4, 3)),
]


@pytest.mark.parametrize(("equation", "kernel", "bias", "x"), EQUATIONS, ids=lambda v: str(v))
def test_einsum(equation, kernel, bias, x):
    init = nnx.initializers.normal(1.0)
    layer = fcg.Fp8Einsum(
        equation, kernel, bias, scaling="current", bias_init=init, rngs=nnx.Rngs(0)
    )
    b = 0 if bias is None else np.asarray(layer.bias[...])
    rng, w = np.random.default_rng(1), np.asarray(layer.kernel[...])
    x = rng.standard_normal(x, np.float32)
    g = rng.standard_normal(jax.eval_shape(layer, jnp.asarray(x)).shape, np.float32)
    graphdef, params = nnx.split(layer)

    def rounded(a, dtype):
        s = jnp.abs(a).max() / largest_of(dtype)
        return a + lax.stop_gradient((a / s).astype(dtype).astype(jnp.float32) * s - a)

    def stated(w, x):
        return jnp.einsum(equation, rounded(x, FORWARD_DTYPE), rounded(w, FORWARD_DTYPE))

    @jax.jit
    def both(params, w, x, g):
        y, pull = jax.vjp(lambda p, x: nnx.merge(graphdef, p)(x), params, x)
        grads, dx = pull(g)
        expected, pull = jax.vjp(stated, w, x)
        return (y, grads.kernel[...], dx), (expected, *pull(rounded(g, GRADIENT_DTYPE)))

    (y, *grads), (expected, *expected_grads) = both(params, w, x, g)
    np.testing.assert_allclose(y, expected + b, rtol=1e-5, atol=1e-5)
    for a, e in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_conversion_keeps_the_parameters():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), fcg.Einsum("na,ab->nb", (3, 2), rngs=rngs))
    kernels = [layer.kernel for layer in model.layers]
    to = partial(fcg.Fp8Linear.from_layer, history=5, margin=1)
    fcg.convert(model, rules={nnx.Linear: to, fcg.Einsum: fcg.Fp8Einsum})
    assert [type(layer) for layer in model.layers] == [fcg.Fp8Linear, fcg.Fp8Einsum]
    assert all(a is layer.kernel for a, layer in zip(kernels, model.layers, strict=True))
    assert model.layers[0].delayed.amax_history.shape == (3, 5)
    assert model.layers[0].margin == 1
    grads = nnx.eval_shape(nnx.grad(lambda m, x: m(x).sum()), model, batch(0))
    assert len(jax.tree.leaves(grads)) == 3


def test_errors():
    for kwargs, message in (
        ({"scaling": "block"}, "Fp8Linear: scaling='block' is none of 'delayed', 'current'"),
        ({"history": 0}, "Fp8Linear: history=0 must be an integer of at least 1"),
        ({"margin": 0.5}, "Fp8Linear: margin=0.5 must be an integer from 0 to 15"),
        ({"dot_general": jnp.dot}, "Fp8Linear computes its product itself"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**kwargs)
    layer = fcg.Fp8Einsum("ab,bc->ac", (2, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Fp8Einsum: einsum_str='ab,bc->ac' must be an equation"):
        layer(jnp.ones((4, 1)))
    with pytest.raises(TypeError, match="its input is int32: cast it first"):
        made()(jnp.ones((2, 4), int))
    with pytest.raises(TypeError, match=r"from_layer takes an nnx.Linear, got a Conv"):
        fcg.Fp8Linear.from_layer(nnx.Conv(1, 1, (1,), rngs=nnx.Rngs(0)))


def test_a_second_derivative_goes_through_the_codes(layer):
    of_x = jax.grad(lambda x: loss(layer, x))
    second = jax.jit(jax.grad(lambda x: (of_x(x) ** 2).sum()))(batch(0))
    assert np.isfinite(second).all()
    assert np.abs(second).max() > 0
