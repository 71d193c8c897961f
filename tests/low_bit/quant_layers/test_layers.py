"""Quantized layers: the gradient of the quantized product, what is kept, and who may become one."""

import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


def _four_bits(axis=-1, **kwargs):
    return {"weight": fcg.FakeQuant(4, axis=axis), "activation": fcg.FakeQuant(4), **kwargs}


def _normal(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def _rngs():
    return nnx.Rngs(0)


def _mask(*shape):
    return (jnp.arange(np.prod(shape)).reshape(shape) % 5 > 0).astype(jnp.float32)


@jax.custom_vjp
def _straight_through(a, q):
    return q


_straight_through.defvjp(lambda a, q: (q, None), lambda _, g: (g, None))


@nnx.jit
def _called(layer, x):
    return layer(x)


def _grouped_conv(**kwargs):
    return fcg.QuantConv(
        4,
        6,
        2,
        2,
        feature_group_count=2,
        padding="CIRCULAR",
        mask=_mask(2, 2, 6),
        rngs=_rngs(),
        **kwargs,
    )


LAYERS = {
    "linear": (lambda: fcg.QuantLinear(6, 4, **_four_bits(), rngs=_rngs()), (5, 6)),
    "conv, grouped, masked, two batch axes": (lambda: _grouped_conv(**_four_bits()), (2, 1, 5, 4)),
    "conv, transposed": (
        lambda: fcg.QuantConvTranspose(3, 2, 3, strides=2, **_four_bits(), rngs=_rngs()),
        (2, 3, 3),
    ),
    "general": (
        lambda: fcg.QuantLinearGeneral((2, 3), 4, axis=(1, -1), **_four_bits(), rngs=_rngs()),
        (2, 2, 3),
    ),
    "einsum": (
        lambda: fcg.QuantEinsum("nta,hab->nthb", (3, 5, 2), (3, 2), **_four_bits(), rngs=_rngs()),
        (2, 3, 5),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_to_the_bit_that_of_the_layer_at_the_quantized_operands(name):
    make, shape = LAYERS[name]
    layer, x = make(), _normal(*shape)
    usual = type(layer).__mro__[1]
    mask = getattr(layer, "mask", None)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ..., graph=True)

    def of_codes(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    def of_quantized(params, x):
        w = params["kernel"][...] if mask is None else params["kernel"][...] * mask
        kernel = nnx.Param(_straight_through(w, jax.lax.stop_gradient(layer.weight(w))))
        merged = nnx.merge(graphdef, nnx.State({**params, "kernel": kernel}), rest)
        values = jax.lax.stop_gradient(layer.activation(x))
        return usual.__call__(merged, _straight_through(x, values))

    @jax.jit
    def gradients(params, x):
        return [
            jax.value_and_grad(lambda *a, f=f: (f(*a) ** 2).sum(), (0, 1))(params, x)
            for f in (of_codes, of_quantized)
        ]

    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda a: a.astype(jnp.float64), (params, x))
        jax.tree.map(np.testing.assert_array_equal, *gradients(params, x))


def test_what_a_mask_takes_out_stays_out():
    def layer(mask):
        return fcg.BinaryConv(2, 2, 2, padding="VALID", mask=mask, rngs=_rngs())

    x, mask = _normal(3, 4, 2), _mask(2, 2, 2)
    masked = layer(mask)
    w = masked.kernel[...] * mask
    scale = jnp.abs(w).mean((0, 1))
    signs = jnp.where(x >= 0, 1.0, -1.0)
    windows = jnp.stack([signs[:, :-1], signs[:, 1:]], 2)
    expected = jnp.einsum("nltc,tcf->nlf", windows, scale * jnp.where(w >= 0, 1, -1) * mask)
    np.testing.assert_allclose(_called(masked, x), expected, rtol=1e-6)
    dkernel = np.asarray(nnx.jit(nnx.grad(lambda layer: layer(x).sum()))(masked).kernel[...])
    mask = np.asarray(mask)
    assert not dkernel[mask == 0].any()
    assert (dkernel[mask == 1] != 0).any()
    np.testing.assert_array_equal(_called(layer(jnp.zeros(mask.shape)), x), 0)


def test_codes_are_kept_and_no_floats():
    images = _normal(2, 8, 8, 16)
    conv = fcg.QuantConv(16, 2, (3, 3), use_bias=False, **_four_bits(), rngs=_rngs())
    weights = 9 * 16 + 2 * 4 + 4  # codes of 2 channels in a byte, scales
    assert fcg.residual_bytes(conv, images) - weights <= images.nbytes / 7

    x = _normal(32, 64)
    binary = fcg.BinaryLinear(64, 8, use_bias=False, rngs=_rngs())
    weights = 64 + 8 * 4  # signs, scales
    assert fcg.residual_bytes(binary, x) - weights == 2 * x.nbytes // 32
    bit = fcg.BitLinear(64, 8, use_bias=False, norm=False, rngs=_rngs())
    weights = 64 * 2 + 4  # codes, scale
    assert fcg.residual_bytes(bit, x) - weights == x.nbytes // 4 + 32 * 4

    embed = fcg.QuantEmbed(8, 4, **_four_bits(0), rngs=_rngs())
    ids = jnp.array([0, 1, 7])
    _, pull = jax.vjp(lambda table: _with_table(embed, table)(ids), embed.embedding[...])
    assert {leaf.dtype for leaf in jax.tree.leaves(pull)} <= {jnp.dtype(jnp.int32)}


def _with_table(embed, table):
    graphdef, _, rest = nnx.split(embed, nnx.Param, ..., graph=True)
    return nnx.merge(graphdef, nnx.State({"embedding": nnx.Param(table)}), rest)


def test_a_table_of_codes_is_looked_up_as_any_other():
    embed = fcg.QuantEmbed(5, 4, **_four_bits(0), rngs=_rngs())
    table = embed.weight(embed.embedding[...])
    ids = jnp.array([[0, -1], [5, 2]])
    found = _called(embed, ids)
    np.testing.assert_array_equal(found, jnp.take(table, ids, axis=0))
    assert np.isnan(found[1, 0]).all()
    one = fcg.QuantEmbed(1, 4, **_four_bits(0), rngs=_rngs())
    np.testing.assert_array_equal(_called(one, ids)[1, 0], one.weight(one.embedding[...])[0])
    with pytest.raises(ValueError, match=r"inputs of dtype float32 must be integers"):
        embed(jnp.ones(3))


def test_the_norm_of_a_bit_linear():
    x = _normal(3, 4) * 100
    with_norm, without = (
        fcg.BitLinear(4, 2, norm=norm, use_bias=False, rngs=_rngs()) for norm in (True, False)
    )
    rms = fcg.RMSNorm(4, use_scale=False, rngs=_rngs())
    np.testing.assert_array_equal(with_norm(x), without(rms(x)))  # eager: XLA fuses neither
    scaled = fcg.RMSNorm(4, rngs=_rngs())
    own = fcg.BitLinear.from_layer(nnx.Linear(4, 2, rngs=_rngs()), norm=scaled)
    assert own.norm is scaled
    assert nnx.jit(nnx.grad(lambda layer: (layer(x) ** 2).sum()))(own).norm.scale[...].any()
    assert fcg.BitLinear.from_layer(nnx.Linear(4, 2, rngs=_rngs()), norm=False).norm is None
    np.testing.assert_array_equal(_called(with_norm, jnp.zeros((3, 4))), 0)
    with pytest.raises(TypeError, match=r"BitLinear: norm='rms' must be a layer, True or False"):
        fcg.BitLinear(4, 2, norm="rms", rngs=_rngs())


REFERENCES = {
    fcg.QuantLinear: lambda: nnx.Linear(4, 2, rngs=_rngs()),
    fcg.QuantLinearGeneral: lambda: nnx.LinearGeneral(4, 2, rngs=_rngs()),
    fcg.QuantEinsum: lambda: nnx.Einsum("nh,hf->nf", (4, 2), rngs=_rngs()),
    fcg.QuantConv: lambda: nnx.Conv(4, 2, 3, rngs=_rngs()),
    fcg.QuantConvTranspose: lambda: nnx.ConvTranspose(4, 2, 3, rngs=_rngs()),
    fcg.QuantEmbed: lambda: nnx.Embed(4, 2, rngs=_rngs()),
    fcg.BinaryLinear: lambda: fcg.Linear(4, 2, rngs=_rngs()),
    fcg.TernaryConv: lambda: fcg.Conv(4, 2, 3, rngs=_rngs()),
}


@pytest.mark.smoke
@pytest.mark.parametrize("cls", REFERENCES)
def test_a_layer_of_nnx_becomes_a_quantized_one_in_place(cls):
    layer = REFERENCES[cls]()
    before = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    static = fcg.FakeQuant(4, dynamic=False)
    quantized = cls.from_layer(layer, weight=static, activation=fcg.FakeQuant(4))
    assert quantized is layer
    assert type(layer) is cls
    assert layer.weight.high is not None  # observed
    after = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert {name: after[name] is value for name, value in before.items()} == dict.fromkeys(
        before, True
    )
    with pytest.raises(TypeError, match=rf"{cls.__name__}.from_layer takes an nnx.\w+, got a Lo"):
        cls.from_layer(nnx.LoRA(4, 2, 2, rngs=_rngs()))


def test_a_layer_that_computes_otherwise_does_not_become_a_quantized_one():
    with pytest.raises(TypeError, match=r"a BitLinear has a `__call__` of its own, which would be"):
        fcg.QuantLinear.from_layer(fcg.BitLinear(4, 2, rngs=_rngs()))
    with pytest.raises(TypeError, match=r"BinaryLinear.from_layer: a NMSparseLinear has a"):
        fcg.BinaryLinear.from_layer(fcg.NMSparseLinear(4, 2, rngs=_rngs()))
    binary = fcg.BinaryLinear(4, 2, rngs=_rngs())
    assert fcg.QuantLinear.from_layer(binary).activation is None


def test_converted_by_a_rule():
    model = nnx.Sequential(nnx.Linear(4, 2, rngs=_rngs()), nnx.Conv(4, 2, 3, rngs=_rngs()))
    model = fcg.convert(model, rules={nnx.Linear: fcg.BinaryLinear, nnx.Conv: fcg.TernaryConv})
    linear, conv = model.layers
    assert isinstance(linear.activation, fcg.BinaryActivation)
    assert isinstance(conv.weight, fcg.TWN)
    assert conv.activation is None
    for cls in (fcg.BinaryLinear, fcg.TernaryLinear, fcg.BitLinear):
        for layer in (
            cls(4, 2, weight=None, activation=None, rngs=_rngs()),
            cls.from_layer(nnx.Linear(4, 2, rngs=_rngs()), weight=None, activation=None),
        ):
            assert layer.weight is layer.activation is None
    x = _normal(3, 4)
    no_norm = fcg.BitLinear(4, 2, weight=None, activation=None, norm=False, rngs=_rngs())
    np.testing.assert_allclose(no_norm(x), nnx.Linear(4, 2, rngs=_rngs())(x), rtol=1e-6)
    given = fcg.BinaryLinear(4, 2, weight=fcg.FakeQuant(2), rngs=_rngs())
    assert given.weight.bits == 2


def test_the_gradient_of_the_output_goes_through_a_layer_first():
    x = _normal(3, 4)

    def gradient(shaper):
        layer = fcg.QuantLinear(4, 2, **_four_bits(), gradient=shaper, rngs=_rngs())
        return nnx.jit(nnx.grad(lambda layer: layer(x).sum()))(layer).kernel[...]

    np.testing.assert_allclose(gradient(fcg.GradientScale(0.5)), gradient(None) / 2)


def test_packed_layers_give_the_same_outputs():
    for layer, x in (
        (_grouped_conv(weight=fcg.BinaryWeight()), _normal(2, 5, 4)),
        (fcg.QuantEmbed(5, 4, **_four_bits(0), rngs=_rngs()), jnp.array([[0, -1], [4, 2]])),
        (fcg.BitLinear(4, 2, rngs=_rngs()), _normal(3, 4)),
    ):
        expected = _called(layer, x)
        np.testing.assert_array_equal(_called(fcg.pack(layer), x), expected)


def test_empty_batches():
    assert _called(fcg.BitLinear(4, 2, rngs=_rngs()), jnp.zeros((0, 4))).shape == (0, 2)
    conv = fcg.QuantConv(4, 2, 3, **_four_bits(), rngs=_rngs())
    assert _called(conv, jnp.zeros((0, 5, 4))).shape == (0, 5, 2)


@pytest.mark.smoke
def test_errors_say_what_to_write():
    with pytest.raises(TypeError, match=r"QuantConv: weight=4 must be a quantizer, such as"):
        fcg.QuantConv(4, 2, 3, weight=4, rngs=_rngs())
    with pytest.raises(TypeError, match=r"QuantEmbed: gradient=1 must be a layer to call, or None"):
        fcg.QuantEmbed(4, 2, gradient=1, rngs=_rngs())
    with pytest.raises(ValueError, match=r'residuals=.codes. must be "quantized" or "original"'):
        fcg.QuantLinear(4, 2, residuals="codes", rngs=_rngs())
    with pytest.raises(ValueError, match=r"QuantLinear computes .* cannot call `dot_general`"):
        fcg.QuantLinear(4, 2, dot_general=lambda *a, **k: None, rngs=_rngs())
    with pytest.raises(ValueError, match=r"QuantConv computes .* cannot call `promote_dtype`"):
        fcg.QuantConv.from_layer(nnx.Conv(4, 2, 3, promote_dtype=lambda a, dtype: a, rngs=_rngs()))
    einsum = fcg.QuantEinsum("ni,if->nf", (4, 2), rngs=_rngs())
    with pytest.raises(ValueError, match=r"einsum_str='ni,ii->ni' must be an equation whose"):
        einsum(jnp.ones((3, 4)), "ni,ii->ni")
    with pytest.raises(TypeError, match=r"QuantLinear quantizes float16, .* its input is int32"):
        fcg.QuantLinear(4, 2, rngs=_rngs())(jnp.ones((3, 4), jnp.int32))


@pytest.mark.smoke
@pytest.mark.parametrize("cls", [*REFERENCES, fcg.BitLinear])
def test_the_constructor_shows_its_quantizers_and_their_types(cls):
    shown = inspect.signature(cls).parameters
    names = ["weight", "activation", "gradient", "residuals"]
    if cls is not fcg.QuantEmbed:
        names.insert(2, "bias")
    assert list(shown)[-len(names) :] == names
    weight, activation, residuals = (shown[n] for n in ("weight", "activation", "residuals"))
    assert weight.annotation == activation.annotation
    assert {fcg.Quantizer, type(None)} <= set(typing.get_args(weight.annotation))
    assert (residuals.name, residuals.default) == ("residuals", "quantized")


def test_a_scale_that_makes_every_input_zero_is_said():
    layer = fcg.QuantLinear(4, 3, activation=fcg.LSQ(4), rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match=r"its LSQ makes every input zero, .* is 0.001: its scale"):
        layer(jnp.full((2, 4), 1e-3))


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: fcg.QuantLinear(4, 3, gradient=fcg.GradientQuant(4, rngs=rngs), rngs=rngs),
        lambda rngs: fcg.QuantLinear(4, 3, gradient=fcg.DoReFaGradient(4, rngs=rngs), rngs=rngs),
        lambda rngs: fcg.Int8Linear(4, 3, backward="int8", stochastic_rounding=True, rngs=rngs),
        lambda rngs: fcg.NVFP4Linear(4, 3, rngs=rngs),
    ],
    ids=["GradientQuant", "DoReFaGradient", "Int8Linear", "NVFP4Linear"],
)
def test_in_eval_mode_nothing_is_drawn_for_a_gradient(make):
    layer, x = make(nnx.Rngs(0)), jnp.ones((2, 4))
    layer.eval()
    y, dx = jax.jit(jax.value_and_grad(lambda x: layer(x).sum()))(x)  # Closes over the streams.
    assert jnp.isfinite(y)
    assert jnp.isfinite(dx).all()
    layer.train()
    step = nnx.jit(nnx.grad(lambda layer, x: (layer(x) ** 2).sum(), argnums=1))
    step(layer, x)
    assert max(jax.tree.leaves(nnx.state(layer, nnx.RngCount))) > 0
