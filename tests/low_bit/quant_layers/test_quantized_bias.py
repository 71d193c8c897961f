"""The bias of a quantized layer, through a quantizer or in int32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


def _normal(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def _made(cls, *args, axis=-1, **kwargs):
    def make(bias):
        quantizers = {"weight": fcg.FakeQuant(8, axis=axis), "activation": fcg.FakeQuant(8)}
        layer = cls(*args, **quantizers, bias=bias, **kwargs, rngs=nnx.Rngs(0))
        layer.bias.set_value(_normal(*layer.bias.shape))
        return layer

    return make


_BIAS = nnx.initializers.normal(1.0)
LAYERS = {
    "linear": (_made(fcg.QuantLinear, 6, 4), (5, 6)),
    "conv": (_made(fcg.QuantConv, 4, 6, 2, feature_group_count=2), (2, 5, 4)),
    "transposed": (
        _made(fcg.QuantConvTranspose, 4, 3, 2, transpose_kernel=True, axis=-2),
        (2, 5, 4),
    ),
    "general": (_made(fcg.QuantLinearGeneral, 4, (2, 3), axis=(-2, -1)), (5, 4)),
    "einsum": (
        _made(fcg.QuantEinsum, "nta,hab->nthb", (3, 5, 2), (3, 2), axis=(0, 2)),
        (2, 3, 5),
    ),
    "BitLinear": (
        lambda bias: fcg.BitLinear(
            6,
            4,
            activation=fcg.FakeQuant(8),
            bias=bias,
            bias_init=nnx.initializers.normal(),
            rngs=nnx.Rngs(0),
        ),
        (5, 6),
    ),
}


@nnx.jit
def _gradients(layer, x):
    return nnx.value_and_grad(lambda layer, x: jnp.sin(layer(x)).sum(), argnums=(0, 1))(layer, x)


@nnx.jit
def _called(layer, x):
    return layer(x)


def test_a_bias_goes_through_its_quantizer():
    make, shape = LAYERS["linear"]
    x = _normal(*shape)
    layer, plain = make(fcg.FakeQuant(4)), make(None)
    plain.bias.set_value(layer.bias_quantizer(layer.bias[...]))
    assert (plain.bias[...] != layer.bias[...]).any()
    (y, (grads, dx)), (expected, (expected_grads, expected_dx)) = (
        _gradients(m, x) for m in (layer, plain)
    )
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(dx, expected_dx)
    np.testing.assert_array_equal(grads.bias[...], expected_grads.bias[...])
    np.testing.assert_array_equal(grads.kernel[...], expected_grads.kernel[...])
    packed = fcg.pack(layer)
    np.testing.assert_array_equal(_called(packed, x), _called(layer, x))
    assert packed.bias.codes.dtype == jnp.uint8
    assert not nnx.to_flat_state(nnx.state(packed, nnx.Param))
    unpacked = fcg.unpack(packed)
    assert isinstance(unpacked.bias_quantizer, fcg.FakeQuant)
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(m)) for m in (fcg.pack(unpacked), packed)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_a_bias_in_int32_is_in_multiples_of_the_steps_of_both_operands(name):
    make, shape = LAYERS[name]
    x = _normal(*shape)
    layer, plain = make("int32"), make(None)

    @nnx.jit
    def steps(layer, x):
        x = x if name != "BitLinear" else layer.norm(x)
        operands = layer.activation.quantize(x), layer.weight.quantize(layer.kernel[...])
        return [operand.parameters[0] for operand in operands]

    s_x, s_w = map(np.asarray, steps(layer, x))
    s = s_x * s_w.reshape(layer.bias.shape if s_w.size > 1 else ())
    b = np.asarray(layer.bias[...])
    plain.bias.set_value(jnp.asarray(np.round(b / s) * s))
    assert (plain.bias[...] != b).any()
    np.testing.assert_allclose(_called(layer, x), _called(plain, x), rtol=1e-6, atol=1e-6)
    if name == "linear":
        (_, (grads, _)), (_, (expected, _)) = (_gradients(m, x) for m in (layer, plain))
        np.testing.assert_allclose(grads.bias[...], expected.bias[...], rtol=1e-6)
        np.testing.assert_array_equal(_called(fcg.pack(layer), x), _called(layer, x))


def test_calibration_and_stacks_set_the_quantizer_of_a_bias():
    @nnx.vmap
    def make(key):
        return nnx.Linear(4, 4, bias_init=_BIAS, rngs=nnx.Rngs(key))

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return layer(x)

    stack = make(jax.random.split(jax.random.key(0), 3))
    quantizers = {"weight": fcg.FakeQuant(8), "bias": fcg.LSQ(4)}
    stack = fcg.QuantLinear.from_layer(stack, **quantizers)
    assert len(np.unique(stack.bias_quantizer.scale[...])) == 3
    x = _normal(2, 4)
    np.testing.assert_allclose(run(x, fcg.pack(stack)), run(x, stack), rtol=1e-6)

    layer = LAYERS["linear"][0](fcg.FakeQuant(8, dynamic=False))
    assert layer.bias_quantizer.high[...] == 0
    fcg.calibrate(layer, [_normal(5, 6)])
    assert layer.bias_quantizer.high[...] == jnp.max(jnp.abs(layer.bias[...]))


def test_what_cannot_quantize_a_bias_is_refused():
    with pytest.raises(TypeError, match="QuantLinear: bias=True must be a quantizer"):
        fcg.QuantLinear(3, 4, bias=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match='bias="int32" is in multiples of the product'):
        fcg.QuantLinear(3, 4, weight=fcg.FakeQuant(8), bias="int32", rngs=nnx.Rngs(0))
    per_token = {"weight": fcg.FakeQuant(8), "activation": fcg.FakeQuant(8, axis="token")}
    layer = fcg.QuantLinear(3, 4, **per_token, bias="int32", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"needs one step for the input.*have shapes \(2, 1\)"):
        layer(jnp.ones((2, 3)))
    blocks = {"weight": fcg.FakeQuant(8, axis=0, block=2), "activation": fcg.FakeQuant(8)}
    layer = fcg.QuantLinear(3, 4, **blocks, bias="int32", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a FakeQuantScheme, has no such step"):
        layer(jnp.ones((2, 3)))
