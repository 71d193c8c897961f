"""Quantizers: codes at every tie and bound, gradients, learned sizes, and what is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import flax_customgrad as fcg
from flax_customgrad.low_bit.quantizers.codes import decode_packed

NAN, INF = float("nan"), float("inf")


def _observed(quantizer, x):
    quantizer.observe(jnp.asarray(x, jnp.float32))
    return quantizer


def _with(quantizer, **parameters):
    for name, value in parameters.items():
        setattr(quantizer, name, nnx.Param(jnp.asarray(value, jnp.float32)))
    return quantizer


# Each with x that meet ties, both bounds and what lies beyond, its codes, and dx for a gradient 1.
CODES = [
    (
        _with(fcg.LSQ(3), scale=0.5),
        [-3.0, -2.0, -1.75, -0.25, 0.25, 0.75, 1.25, 1.5, 1.51, NAN],
        [0, 0, 0, 4, 4, 6, 6, 7, 7, 0],
        [0, 1, 1, 1, 1, 1, 1, 1, 0, 0],
    ),
    (
        _with(fcg.LSQ(2, signed=False), scale=0.5),
        [-0.1, 0.0, 0.25, 0.75, 1.25, 1.5, 1.51],
        [0, 0, 0, 2, 2, 3, 3],
        [0, 1, 1, 1, 1, 1, 0],
    ),
    (
        _with(fcg.LSQPlus(2, signed=False), scale=0.5, offset=-0.5),
        [-0.6, -0.5, -0.25, 0.25, 0.75, 1.0, 1.01],
        [0, 0, 0, 2, 2, 3, 3],
        [0, 1, 1, 1, 1, 1, 0],
    ),
    (
        _with(fcg.TQT(3), log2_t=0.6),
        [-2.1, -2.0, -1.75, -0.25, 0.25, 0.75, 1.5, 1.51],
        [0, 0, 0, 4, 4, 6, 7, 7],
        [0, 1, 1, 1, 1, 1, 1, 0],
    ),
    (
        fcg.PACT(2, alpha=1.5),
        [-0.1, 0.0, 0.25, 0.75, 1.25, 1.49, 1.5, 9.0],
        [0, 0, 0, 2, 2, 3, 3, 3],
        [0, 1, 1, 1, 1, 1, 0, 0],
    ),
    (
        fcg.DoReFaActivation(1),
        [-0.1, 0.0, 0.5, 0.51, 1.0, 1.1],
        [0, 0, 0, 1, 1, 1],
        [0, 1, 1, 1, 1, 0],
    ),
    (
        _with(fcg.EWGS(2, signed=False, delta=0.0), low=0.0, high=1.5, scale=1.5),
        [-0.1, 0.0, 0.25, 0.75, 1.25, 1.5, 1.51],
        [0, 0, 0, 2, 2, 3, 3],
        [0, 1, 1, 1, 1, 1, 0],
    ),
    (
        fcg.BinaryActivation(0.5),
        [-0.51, -0.5, -0.0, 0.0, 0.5, 0.51],
        [0, 0, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 0],
    ),
    (fcg.TWN(1.0), [-2.0, -1.0, 0.0, 1.0, 1.5, 0.5], [0, 1, 1, 1, 2, 1], [1] * 6),
    (fcg.AbsMean(), [-1.25, -0.5, 0.5, 0.75, 2.0, 1.0], [0, 1, 1, 2, 2, 2], [1] * 6),
    (
        _with(fcg.TTQ(0.5), positive=3.0, negative=0.25),
        [-2.0, -1.0, 1.0, 1.5],
        [0, 1, 1, 2],
        [0.25, 1, 1, 3],
    ),
]


@pytest.mark.smoke
def test_codes_and_gradient_at_ties_and_bounds():
    @jax.jit
    def program(xs):
        def results(quantizer, x):
            codes = quantizer.quantize(x)
            return codes.values, codes.codes, jax.grad(lambda x: quantizer(x).sum())(x)

        return [results(case[0], x) for case, x in zip(CODES, xs, strict=True)]

    found = program([jnp.array(x) for _, x, *_ in CODES])
    for (quantizer, x, codes, dx), got in zip(CODES, found, strict=True):
        name = type(quantizer).__name__
        np.testing.assert_array_equal(got[1], codes, err_msg=name)
        np.testing.assert_array_equal(np.isfinite(got[0]), np.isfinite(x), err_msg=name)
        np.testing.assert_array_equal(got[2], dx, err_msg=name)


@pytest.mark.parametrize("bits", [9, 12, 16])
@pytest.mark.parametrize("shape", [(4, 7), ()])
def test_more_than_8_bits_are_codes_of_two_bytes(bits, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    quantizers = [fcg.FakeQuant(bits), fcg.FakeQuant(bits, symmetric=False), fcg.LSQ(bits)]
    quantizers += [fcg.LSQPlus(bits, signed=False), fcg.TQT(bits), fcg.EWGS(bits)]
    observe(quantizers, x)

    @jax.jit
    def program(x):
        found = [quantizer.quantize(x) for quantizer in quantizers]
        return [(codes.values, codes.codes, codes.decode(), *codes.parameters) for codes in found]

    for quantizer, (values, codes, decoded, step, *_) in zip(quantizers, program(x), strict=True):
        name = type(quantizer).__name__
        assert codes.dtype == jnp.uint16
        np.testing.assert_array_equal(decoded, values, err_msg=name)
        if name not in ("TQT", "EWGS"):
            assert np.abs(values - x).max() <= 1.01 * step + 1e-6


def test_a_layer_of_16_bits_trains_and_packs():
    quantizers = {"weight": fcg.FakeQuant(16, axis=-1), "activation": fcg.FakeQuant(12)}
    layer = fcg.QuantLinear(6, 5, **quantizers, rngs=nnx.Rngs(0))
    exact, x = fcg.Linear(6, 5, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (7, 6))
    gradient = nnx.jit(nnx.grad(lambda m, x: (m(x) ** 2).sum(), argnums=(0, 1)))
    for a, b in zip(*(jax.tree.leaves(gradient(m, x)) for m in (layer, exact)), strict=True):
        np.testing.assert_allclose(a, b, atol=0.02)
    before = layer(x)
    packed = fcg.pack(layer)
    np.testing.assert_array_equal(packed(x), before)
    assert packed.kernel.codes.dtype == jnp.uint16


def test_a_quantizer_that_is_not_enabled_changes_nothing():
    layer = fcg.QuantLinear(6, 5, weight=fcg.LSQ(2), activation=fcg.FakeQuant(2), rngs=nnx.Rngs(0))
    exact, x = fcg.Linear(6, 5, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (7, 6))
    call = nnx.jit(lambda m, x: m(x))
    quantized = call(layer, x)
    layer.set_attributes(fcg.Quantizer, enabled=False)
    np.testing.assert_array_equal(call(layer, x), call(exact, x))
    assert layer.activation(x) is x
    layer.set_attributes(fcg.Quantizer, enabled=True)
    np.testing.assert_array_equal(call(layer, x), quantized)


@pytest.mark.parametrize("graph", [True, False])
def test_a_step_that_is_traced_switches_quantizers_on(graph):
    quantizers = {"weight": fcg.LSQ(2), "activation": fcg.FakeQuant(2, dynamic=False)}
    layer = fcg.QuantLinear(6, 5, **quantizers, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (7, 6))
    layer.activation.observe(x)
    traces = []

    def gradients(layer, x):
        y, (grads, dx) = nnx.value_and_grad(lambda m, x: (m(x) ** 2).sum(), argnums=(0, 1))(
            layer, x
        )
        return y, dx, grads.kernel[...], grads.bias[...], grads.weight.scale[...]

    @nnx.jit
    def program(layer, x, step):
        traces.append(step)
        layer.set_attributes(fcg.Quantizer, enabled=step >= 2)
        return gradients(layer, x)

    with nnx.set_graph_mode(graph):
        off = nnx.clone(layer, graph=True)
        off.set_attributes(fcg.Quantizer, enabled=False)
        expected = {on: nnx.jit(gradients)(m, x) for on, m in ((False, off), (True, layer))}
        found = nnx.clone(layer, graph=True)
        for step in range(4):
            got = program(found, x, jnp.asarray(step))
            for a, b in zip(got, expected[step >= 2], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert len(traces) <= 2


def test_a_counter_in_a_variable_switches_quantizers_on():
    x = jnp.linspace(0.1, 1, 8)
    quantizer = fcg.FakeQuant(2, calibration="moving_average")
    quantizer.enabled = nnx.Variable(jnp.array(False))

    @nnx.jit
    def program(quantizer, xs):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def run(carry, x):
            quantizer, step = carry
            quantizer.enabled[...] = step >= 2
            return (quantizer, step + 1), quantizer(x)

        return run((quantizer, 0), xs)[1]

    out = program(quantizer, jnp.stack([x, 2 * x, x, x]))
    np.testing.assert_array_equal(out[:2], jnp.stack([x, 2 * x]))
    # What was recorded before it was switched on counts.
    np.testing.assert_allclose(quantizer.high[...], 1 + 0.01 * 1 * 0.99**2, rtol=1e-3)
    assert np.unique(out[2].round(3)).size == 2
    # Outside of a compiled function the value is known.
    packed = fcg.pack(fcg.QuantLinear(8, 3, weight=fcg.FakeQuant(4), rngs=nnx.Rngs(0)))
    assert packed.kernel.bits == 4
    layer = fcg.QuantLinear(8, 3, weight=fcg.FakeQuant(4), rngs=nnx.Rngs(0))
    layer.weight.enabled = nnx.Variable(jnp.array(False))
    with pytest.raises(ValueError, match="no layer of the model has a quantizer"):
        fcg.pack(layer)


EACH = [
    fcg.FakeQuant(4, axis=-1),
    fcg.FakeQuant(3, symmetric=False),
    fcg.FakeQuant(5, axis=0, block=2),
    fcg.LSQ(2, axis=-1),
    fcg.LSQPlus(5),
    fcg.PACT(7),
    fcg.TQT(4),
    fcg.EWGS(3),
    fcg.DoReFaWeight(6),
    fcg.DoReFaActivation(3),
    fcg.BinaryWeight(gradient="xnor"),
    fcg.BinaryActivation(),
    fcg.TWN(axis=-1),
    fcg.AbsMean(),
    fcg.TTQ(0.3),
]


@nnx.jit
def observe(quantizers, x):
    for quantizer in quantizers:
        quantizer.observe(x)


def test_codes_decode_to_the_values_in_every_program():
    x = jax.random.normal(jax.random.key(0), (7, 12))
    quantizers = [nnx.clone(quantizer) for quantizer in EACH]
    observe(quantizers, x)

    @jax.jit
    def compiled(x):
        def results(quantizer):
            codes = quantizer.quantize(x)
            decoded = decode_packed(codes.codes, codes.parameters, codes.scheme, 8, x)
            return *codes[:3], decoded

        return [results(quantizer) for quantizer in quantizers]

    for quantizer, found in zip(quantizers, compiled(x), strict=True):
        name, eager = type(quantizer).__name__, quantizer.quantize(x)
        values, codes, parameters, decoded = found
        assert values.dtype == x.dtype
        np.testing.assert_array_equal(codes, eager.codes, err_msg=name)
        np.testing.assert_array_equal(values, eager.values, err_msg=name)
        np.testing.assert_array_equal(decoded, values, err_msg=name)
        again = decode_packed(codes, parameters, eager.scheme, 8, x)
        np.testing.assert_array_equal(again, values, err_msg=name)


KEEPING_CONSTANTS = [
    fcg.FakeQuant(4, dynamic=False),
    fcg.FakeQuant(4, dynamic=False, symmetric=False, axis=-1),
    fcg.LSQPlus(4),
    fcg.LSQPlus(2, signed=False, axis=-1),
    fcg.EWGS(4),
    fcg.EWGS(1),
    fcg.BinaryWeight(),
    fcg.TWN(),
    fcg.AbsMean(),
    fcg.TTQ(),
]
# The value of a constant is one of theirs but for a step.
KEEPING_ZEROS = [
    *(fcg.LSQ(4), fcg.LSQ(3, signed=False, axis=-1), fcg.PACT(4), fcg.TQT(4)),
    *(fcg.EWGS(4, signed=False), fcg.DoReFaActivation(4)),
]


@pytest.mark.parametrize("value", [0.0, 0.3, -0.7, 1e-30, 3e38])
def test_zeros_and_constants_stay(value):
    x = jnp.full((3, 5), value, jnp.float32)
    quantizers = [*KEEPING_CONSTANTS, *(KEEPING_ZEROS if value == 0 else ())]
    quantizers = [nnx.clone(quantizer) for quantizer in quantizers]
    observe(quantizers, x)
    found = jax.jit(lambda x: [quantizer(x) for quantizer in quantizers])(x)
    for quantizer, y in zip(quantizers, found, strict=True):
        if value == 3e38 and isinstance(quantizer, fcg.EWGS):
            continue  # Twice that is not finite: it is half the largest number.
        np.testing.assert_allclose(y, x, rtol=1e-6, err_msg=type(quantizer).__name__)


@pytest.mark.parametrize("exponent", [-26, -15, -13, 0, 3, 100])
def test_a_threshold_that_is_a_power_of_two_is_not_doubled(exponent):
    quantizer = _observed(fcg.TQT(4), 2.0**exponent)
    assert quantizer.log2_t[...] == exponent
    assert quantizer.quantize(jnp.ones(())).parameters[0] == exponent


SHARING = [
    fcg.FakeQuant(4, axis_name="data"),
    fcg.FakeQuant(4, axis=-1, symmetric=False, axis_name="data"),
    fcg.FakeQuant(4, calibration="percentile", percentile=90, axis_name="data"),
    fcg.FakeQuant(4, calibration="moving_average", axis_name="data"),
    fcg.DoReFaWeight(4, axis_name="data"),
    fcg.BinaryWeight(gradient="xnor", clip_value=None, axis_name="data"),
    fcg.TWN(axis_name="data"),
    fcg.AbsMean(axis=-1, axis_name="data"),
    fcg.TTQ(0.3, axis_name="data"),
    fcg.GradientQuant(4, stochastic=False, axis_name="data"),
]


@pytest.mark.parametrize("how", ["check_vma", "no check_vma", "vmap"])
def test_parts_of_an_array_share_its_range(how):
    x = jax.random.normal(jax.random.key(3), (8, 5))

    def results(axis_name, quantizers, x):
        def result(quantizer, x):
            quantizer = nnx.clone(quantizer)
            granularity = dataclasses.replace(quantizer.granularity, axis_name=axis_name)
            quantizer.granularity = granularity
            y, pull = jax.vjp(lambda x: nnx.clone(quantizer)(x), x)
            quantizer(x)
            recorded = getattr(quantizer, "dynamic", None) is False
            return y, pull(x)[0], quantizer.high if recorded else None

        return [result(quantizer, x) for quantizer in quantizers]

    whole = jax.jit(lambda x: results(None, SHARING, x))(x)
    if how == "vmap":
        split = x.reshape(2, 4, 5)
        parts = jax.jit(jax.vmap(lambda x: results("data", SHARING, x), axis_name="data"))(split)
    else:
        parts = jax.jit(
            jax.shard_map(
                lambda x: jax.tree.map(
                    lambda a: a[None] if a.ndim < 2 else a, results("data", SHARING, x)
                ),
                mesh=jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",)),
                in_specs=P("data"),
                out_specs=P("data"),
                check_vma=how == "check_vma",
            )
        )(x)
    for quantizer, found, expected in zip(SHARING, parts, whole, strict=True):
        for got, want in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            got = got.reshape(-1, *want.shape) if want.ndim < 2 else got.reshape(want.shape)
            np.testing.assert_allclose(
                got, np.broadcast_to(want, got.shape), rtol=1e-6, err_msg=type(quantizer).__name__
            )


def test_extreme_values():
    @nnx.jit
    def both(quantizers, x):
        def total(quantizer, x):
            y = quantizer(x)
            return (y / 2**10).sum(dtype=jnp.float32), y

        return [nnx.grad(total, argnums=(0, 1), has_aux=True)(q, x) for q in quantizers]

    quantizers = [nnx.clone(quantizer) for quantizer in EACH]
    zero = jnp.zeros((6, 12), jnp.bfloat16)
    tiny = zero.at[1, 2].set(1e-38)
    largest = zero.at[0, :].set(1e38).at[1, :].set(-1e38).at[2, 3].set(1e-30)
    for x in (zero, tiny, largest):
        observe(quantizers, x)
        for q, ((dquantizer, dx), y) in zip(quantizers, both(quantizers, x), strict=True):
            assert np.isfinite(np.asarray(y, np.float32)).all(), q
            assert np.isfinite(np.asarray(dx, np.float32)).all(), q
            if x is not largest:
                # A scale's gradient sums up to 128 steps of each element.
                grads = jax.tree.leaves(nnx.state(dquantizer))
                assert all(np.isfinite(np.asarray(a)).all() for a in grads), q
    for bad in (INF, -INF, NAN):
        x = zero.at[3, 4].set(bad)
        observe(quantizers, x)
        for q, (_, y) in zip(quantizers, both(quantizers, x), strict=True):
            assert not np.isfinite(np.float32(y[3, 4])), q
    empty = jnp.zeros((0, 12))
    observe(quantizers, empty)
    for _, y in both(quantizers, empty):
        assert y.shape == (0, 12)


LEARNED = [
    (fcg.LSQ(4), "scale"),
    (fcg.LSQPlus(4), "scale"),
    (fcg.PACT(4), "alpha"),
    (fcg.EWGS(4), "scale"),
    (fcg.TTQ(), "positive"),
]


def test_a_size_that_is_driven_to_zero_or_below_can_grow_again():
    x = jnp.array([-2.0, -0.3, 0.0, 0.4, 3.0])

    def loss(quantizer):
        return ((quantizer(x) - x) ** 2).sum()

    @nnx.jit
    def steps(quantizers, start):
        """The loss, the gradient of the size, and the loss after a step against it."""
        results = []
        for quantizer, (_, name) in zip(quantizers, LEARNED, strict=True):
            size = getattr(quantizer, name)
            size[...] = start
            before, grads = nnx.value_and_grad(loss)(quantizer)
            slope = getattr(grads, name)[...]
            size[...] = start - 1e-3 * jnp.sign(slope)
            results.append((before, slope, loss(quantizer)))
        return results

    quantizers = [quantizer for quantizer, _ in LEARNED]
    for start in (0.0, -1e-30, -0.01, 1e-40):
        found = steps(quantizers, jnp.float32(start))
        for (before, slope, afterwards), quantizer in zip(found, quantizers, strict=True):
            assert np.isfinite(before), quantizer
            assert np.isfinite(slope), quantizer
            assert slope != 0, quantizer
            assert afterwards < before, quantizer


def test_an_interval_that_is_closed_or_turned_around_is_defined():
    x = jnp.array([-2.0, -0.3, 0.0, 0.4, 3.0])
    gradient = nnx.jit(nnx.grad(lambda q: q(x).sum()))
    for high in (0.0, -1.0):
        grads = gradient(_with(fcg.EWGS(2), low=0.0, high=high))
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(grads))


def test_no_threshold_makes_a_power_of_two_zero():
    x = jnp.array([-2.0, 0.5])
    total = lambda t: _with(fcg.TQT(4), log2_t=t)(x).sum()  # noqa: E731
    ys, slopes = jax.jit(jax.vmap(jax.value_and_grad(total)))(
        jnp.array([-1e6, -INF, 1e6, INF, NAN])
    )
    assert np.isfinite(ys[:-1]).all()
    assert np.isfinite(slopes[:-1]).all()
    assert np.isnan(ys[-1])


# LSQ


def test_the_gradient_of_a_scale_does_not_depend_on_how_examples_come():
    x = 2 * jax.random.normal(jax.random.key(1), (8, 3, 4))

    def dscale(x):
        def total(scale):
            return (_with(fcg.LSQ(3, features=2), scale=scale)(x) * x).sum()

        return jax.grad(total)(0.5)

    @jax.jit
    def program(x):
        return dscale(x), sum(map(dscale, jnp.split(x, 4))), jax.vmap(dscale)(x).sum()

    whole, in_parts, each = program(x)
    np.testing.assert_allclose(in_parts, whole, rtol=1e-5)
    np.testing.assert_allclose(each, whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "n"),
    [({"axis": (0, 2)}, 3), ({"features": 1}, 4)],
)
def test_lsq_is_the_papers_formula(arguments, n):
    with jax.enable_x64(True):
        x, g = np.asarray(jax.random.normal(jax.random.key(2), (2, 2, 3, 4), jnp.float64))
        quantizer = fcg.LSQ(3, **arguments)
        observe([quantizer], x)
        shared = (
            ()
            if quantizer.scale.shape == ()
            else tuple(i for i, size in enumerate(quantizer.scale.shape) if size == 1)
        )
        axes = shared or (0, 1, 2)
        mean = np.abs(x).mean(axes).reshape(quantizer.scale.shape)
        np.testing.assert_allclose(quantizer.scale[...], 2 * mean / 3**0.5, rtol=1e-6)
        s = 0.5 * mean
        quantizer.scale = nnx.Param(jnp.asarray(s))
        v = x / s
        inside = (v >= -4) & (v <= 3)
        slope = np.where(inside, np.round(v) - v, np.where(v < 0, -4, 3))
        expected = (g * slope).sum(axes).reshape(s.shape) / (n * 3) ** 0.5

        def total(q, x):
            y = q(x)
            return (y * g).sum(), y

        gradient = nnx.jit(nnx.grad(total, argnums=(0, 1), has_aux=True))
        (dquantizer, dx), y = gradient(quantizer, jnp.asarray(x))
        np.testing.assert_allclose(dquantizer.scale[...], expected, rtol=1e-12)
        np.testing.assert_array_equal(dx, np.where(inside, g, 0))
        np.testing.assert_array_equal(y, s * np.clip(np.round(v), -4, 3))


def test_observing_again_keeps_the_parameter():
    quantizer = fcg.LSQ(4, axis=0)
    quantizer.observe(jnp.ones((2, 3)))
    before = quantizer.scale
    quantizer.observe(jnp.array([[NAN, 4.0], [0.0, 0.0]]))
    assert quantizer.scale is before
    np.testing.assert_allclose(before[...], [[8 / 7**0.5], [1.0]], rtol=1e-6)


# What is kept


@pytest.mark.parametrize(
    ("quantizer", "expected"),
    [
        (fcg.FakeQuant(4), 0),
        (_observed(fcg.FakeQuant(4, dynamic=False), [2.0]), 16),
        (fcg.LSQ(4), 0),
        (fcg.PACT(4), 32),
        (fcg.DoReFaWeight(4), 4),
        (fcg.DoReFaActivation(4), 16),
        (fcg.BinaryActivation(), 16),
        (fcg.BinaryActivation(None), 0),
        (fcg.BinaryWeight(), 16 + 32),
        (fcg.TWN(), 0),
        (fcg.AbsMean(), 0),
        (fcg.TTQ(), 32),
        (fcg.GradientQuant(4, stochastic=False), 0),
    ],
    ids=lambda q: type(q).__name__,
)
def test_what_is_kept_beyond_x_and_the_parameters(quantizer, expected):
    x = jnp.ones((16, 8))
    assert fcg.residual_bytes(lambda q, x: q(x), quantizer, x) == expected


# Gradients that are quantized


def test_the_mean_of_a_noisy_gradient_is_the_gradient():
    g = jnp.array([0.9, -0.35, 0.1, 0.0])
    many = jnp.broadcast_to(g, (4000, 4))

    @nnx.jit
    def pulled(layer):
        return nnx.grad(lambda layer, x: (layer(x) * many).sum(), argnums=1)(layer, many)

    for layer, values in (
        (fcg.GradientQuant(3, rngs=nnx.Rngs(0)), jnp.arange(-3, 4) / 3),
        (fcg.DoReFaGradient(2, rngs=nnx.Rngs(0)), jnp.array([-1, -1 / 3, 1 / 3, 1])),
    ):
        dx = pulled(layer)
        assert dx.dtype == g.dtype
        distance = np.abs(np.unique(dx)[:, None] - np.asarray(values * g[0]))
        assert distance.min(1).max() < 1e-6
        np.testing.assert_allclose(dx.mean(0), g, atol=0.03)
        assert not jnp.array_equal(dx, pulled(layer))


def test_a_gradient_of_zeros_stays_zeros_and_a_non_finite_one_is_not_hidden():
    layer = fcg.DoReFaGradient(2, rngs=nnx.Rngs(0))

    @nnx.jit
    def pull(layer, g):
        return nnx.grad(lambda layer, x: (layer(x) * g).sum(), argnums=1)(layer, g)

    def pulled(g):
        return pull(layer, g)

    g = jnp.array([[0.0, 0.0], [INF, 1.0], [1.0, -1.0]])
    dx = pulled(g)
    assert (dx[0] == 0).all()
    assert not jnp.isfinite(dx[1]).any()
    np.testing.assert_array_equal(dx[2], [1, -1])
    assert pulled(jnp.zeros((0, 3))).shape == (0, 3)


# Errors


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: fcg.LSQ(1), r"LSQ: bits=1 must be an integer from 2 to 16"),
        (lambda: fcg.LSQPlus(True), r"LSQPlus: bits=True must be an integer"),
        (lambda: fcg.LSQ(axis="token"), r'LSQ: axis="token" has no scales to learn'),
        (lambda: fcg.LSQ(features=0), r"LSQ: features=0 must be an integer of at least 1"),
        (lambda: fcg.LSQ(grad_scale="paper"), r"grad_scale='paper' must be \"lsq\" or a number"),
        (lambda: fcg.LSQ(axis=-1)(jnp.ones((2, 3))), r"LSQ: axis=\(-1,\) .* call observe\(x\)"),
        (
            lambda: _observed(fcg.LSQ(axis=-1), np.ones((2, 3)))(jnp.ones((2, 4))),
            r"`scale` has shape \(3,\), which does not fit an input of shape \(2, 4\)",
        ),
        (lambda: fcg.PACT(alpha=0), r"PACT: alpha=0 must be positive"),
        (lambda: fcg.PACT(17), r"PACT: bits=17 must be an integer from 1 to 16"),
        (lambda: fcg.EWGS(delta=-1), r"EWGS: delta=-1 must be a number from 0 on"),
        (lambda: fcg.TTQ(1.0), r"TTQ: threshold=1.0 must be in \[0, 1\)"),
        (lambda: fcg.TWN(0.0), r"TWN: threshold=0.0 must be positive"),
        (lambda: fcg.AbsMean(clip_value=0), r"AbsMean: clip_value=0 must be positive"),
        (lambda: fcg.BinaryWeight(gradient="ste"), r"gradient='ste' must be \"bi_real\" or"),
        (lambda: fcg.BinaryWeight(scaled=False, gradient="xnor"), r"leave out scaled=False"),
        (
            lambda: fcg.BinaryWeight(axis=2)(jnp.ones((2, 3))),
            r"axis=\(2,\) does not exist in an array",
        ),
        (
            lambda: fcg.GradientQuant(8),
            r"GradientQuant: stochastic=True draws noise: write rngs=nnx.Rngs\(0\)",
        ),
    ],
)
def test_errors(make, error):
    with pytest.raises(ValueError, match=error):
        make()
