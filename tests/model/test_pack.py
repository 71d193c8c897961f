"""From a quantized model to its codes and back: the same outputs, few bytes, a checkpoint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import flax_customgrad as fcg


class Network(nnx.Module):
    def __init__(self, rngs, bits=4):
        self.layers = nnx.List(
            [
                fcg.QuantLinear(
                    6,
                    9,
                    weight=fcg.FakeQuant(bits, axis=-1),
                    activation=fcg.FakeQuant(8, calibration="moving_average"),
                    rngs=rngs,
                ),
                fcg.QuantLinear(
                    9, 5, weight=fcg.FakeQuant(bits, symmetric=False, block=4, axis=0), rngs=rngs
                ),
            ]
        )
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.head(x)


X = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)


@nnx.jit
def _forward(model, x):
    return model(x)


@nnx.jit
def _gradients(model, x):
    """The gradients of a sum of squares: of the parameters, and of the input."""
    return nnx.grad(lambda model, x: (model(x) ** 2).sum(), argnums=(0, 1))(model, x)


@functools.cache
def _models(bits):
    model = Network(nnx.Rngs(0), bits)
    _forward(model, X)  # The moving average takes a range in.
    return model, fcg.pack(model)


def _trained_and_packed(bits=4):
    return map(nnx.clone, _models(bits))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_outputs_are_the_same_to_the_bit(bits):
    model, packed = _trained_and_packed(bits)
    model.eval()
    np.testing.assert_array_equal(_forward(packed, X), _forward(model, X))
    kernel = packed.layers[0].kernel
    assert kernel.codes[...].dtype == (jnp.int8 if bits == 8 else jnp.uint8)
    assert kernel.codes[...].shape == (6, -(-9 * kernel.bits // 8))
    assert isinstance(model.layers[0].kernel, nnx.Param)


def test_what_is_packed_has_no_parameters_and_no_gradient():
    model, packed = _trained_and_packed()
    paths = {path[:-1] for path, _ in nnx.to_flat_state(nnx.state(packed, nnx.Param))}
    assert paths == {("head",), ("layers", 0), ("layers", 1)}
    assert len(nnx.to_flat_state(nnx.state(packed, nnx.Param))) == 4
    # The gradient of the input is that of the model in eval mode.
    model.eval()
    (grads, dx), (_, expected) = (_gradients(m, X) for m in (packed, model))
    assert grads.head.kernel[...].shape == (5, 2)
    np.testing.assert_array_equal(dx, expected)


def test_unpacking_gives_what_the_codes_stand_for():
    model, packed = _trained_and_packed()
    unpacked = fcg.unpack(packed)
    layer = unpacked.layers[0]
    weights = [m.layers[0].weight(m.layers[0].kernel) for m in (unpacked, model)]
    np.testing.assert_array_equal(*weights)
    assert isinstance(layer.weight, fcg.FakeQuant)
    assert not layer.activation.use_running_average
    unpacked.eval()
    np.testing.assert_allclose(_forward(unpacked, X), _forward(packed, X), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_restores_a_packed_model(tmp_path):
    _, packed = _trained_and_packed()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", nnx.to_pure_dict(nnx.state(packed)))
        checkpointer.wait_until_finished()
        abstract = nnx.eval_shape(lambda: fcg.pack(Network(nnx.Rngs(1))))
        graphdef, state = nnx.split(abstract)
        restored = checkpointer.restore(tmp_path / "packed", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    restored = nnx.merge(graphdef, state)
    np.testing.assert_array_equal(_forward(restored, X), _forward(packed, X))


def test_an_embedding_is_packed():
    layer = fcg.QuantEmbed(10, 6, weight=fcg.FakeQuant(4, axis=0), rngs=nnx.Rngs(0))
    packed = fcg.pack(layer)

    @nnx.jit
    def outputs(layer):
        ids = jnp.array([[0, 3], [9, -1]])
        return layer(ids), layer.attend(jnp.ones((2, 6)))

    for got, expected in zip(outputs(packed), outputs(layer), strict=True):
        np.testing.assert_array_equal(got, expected)


class InInt8(nnx.Module):
    def __init__(self, rngs):
        self.conv = fcg.Int8Conv(
            4, 6, 3, mask=jnp.arange(72).reshape(3, 4, 6) % 5 > 0, dtype=jnp.bfloat16, rngs=rngs
        )
        self.linear = fcg.Int8Linear(6, 5, backward="int8", rngs=rngs)
        self.head = fcg.Int8Linear(
            5, 3, residuals="original", activation_scale="per_tensor", rngs=rngs
        )

    def __call__(self, x):
        return self.head(jax.nn.relu(self.linear(self.conv(x))))


IMAGES = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)


def test_layers_in_int8_are_packed_as_they_multiply(tmp_path):
    model = InInt8(nnx.Rngs(0))
    packed = fcg.pack(model)
    model.eval()
    np.testing.assert_array_equal(_forward(packed, IMAGES), _forward(model, IMAGES))
    kernel = packed.linear.kernel
    assert (kernel.codes[...].dtype, kernel.codes[...].shape) == (jnp.int8, (6, 5))
    assert kernel.scale[...].shape == (1, 5)
    assert len(nnx.to_flat_state(nnx.state(packed, nnx.Param))) == 3  # The biases.

    sizes = fcg.size_report(packed).sizes
    kernels = [(s.path, s.bits, s.nbytes, s.unpacked_nbytes) for s in sizes if s.bits]
    assert kernels[:2] == [("conv/kernel", 8, 72 + 24, 288), ("head/kernel", 8, 15 + 12, 60)]

    unpacked = fcg.unpack(packed)
    np.testing.assert_array_equal(unpacked.linear.kernel[...], kernel[...])
    np.testing.assert_allclose(kernel[...], model.linear.kernel[...], atol=0.01)
    np.testing.assert_allclose(_forward(unpacked, IMAGES), _forward(model, IMAGES), atol=1e-2)
    with pytest.raises(ValueError, match="no layer of the model has a quantizer"):
        fcg.pack(packed)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", nnx.to_pure_dict(nnx.state(packed)))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "packed")
    np.testing.assert_array_equal(restored["linear"]["kernel"]["codes"], kernel.codes[...])


def test_packed_layers_in_int8_have_the_gradient_of_their_input():
    for backward in ("float", "int8", "switchback"):
        layer = fcg.Int8Linear(
            6, 40, backward=backward, weight_scale="per_channel", rngs=nnx.Rngs(0)
        )
        packed = fcg.pack(layer)
        # Not compiled, as a packed model may be called too.
        np.testing.assert_array_equal(packed(X), layer(X))
        (grads, dx), (expected, expected_dx) = (_gradients(m, X) for m in (packed, layer))
        np.testing.assert_array_equal(dx, expected_dx)
        np.testing.assert_array_equal(grads.bias[...], expected.bias[...])


def test_the_report_counts_every_byte():
    model, packed = _trained_and_packed()
    report = fcg.size_report(packed)
    assert report.nbytes == sum(a.nbytes for a in jax.tree.leaves(nnx.state(packed)))
    assert [s.path for s in report.sizes if s.bits] == ["layers/0/kernel", "layers/1/kernel"]
    assert "PackedKernel" in str(report)
    assert f"{report.nbytes:,}" in str(report)
    plain = fcg.size_report(model)
    assert plain.nbytes == plain.unpacked_nbytes > report.nbytes


@pytest.mark.smoke
def test_what_cannot_be_packed_is_said():
    with pytest.raises(ValueError, match=r"no layer .* has a quantizer for its weights, or is"):
        fcg.pack(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no layer of the model is packed"):
        fcg.unpack(Network(nnx.Rngs(0)))
    with pytest.raises(TypeError, match="expected a Module"):
        fcg.pack([1, 2])


# Packed again.

QUANTIZERS = {
    "channels": lambda: fcg.FakeQuant(8, axis=-1),
    "affine": lambda: fcg.FakeQuant(4, symmetric=False, axis=0, block=5),
    "percentile": lambda: fcg.FakeQuant(4, calibration="percentile", percentile=93.0),
    "recorded": lambda: fcg.FakeQuant(4, dynamic=False),
    "LSQ": lambda: fcg.LSQ(4, axis=-1),
    "LSQPlus": lambda: fcg.LSQPlus(4),
    "PACT": lambda: fcg.PACT(4),
    "TQT": lambda: fcg.TQT(4),
    "EWGS": lambda: fcg.EWGS(3),
    "DoReFaWeight": lambda: fcg.DoReFaWeight(3),
    "BinaryWeight": lambda: fcg.BinaryWeight(),
    "TWN": lambda: fcg.TWN(axis=-1),
    "AbsMean": lambda: fcg.AbsMean(),
    "TTQ": lambda: fcg.TTQ(0.3),
}


@pytest.mark.parametrize("make", QUANTIZERS.values(), ids=list(QUANTIZERS))
def test_what_was_unpacked_is_packed_to_the_bit(make):
    layer = fcg.QuantLinear(33, 17, weight=make(), rngs=nnx.Rngs(1))
    if isinstance(layer.weight, fcg.EWGS):  # Trained: values are not what they are made of.
        layer.weight.high[...] = 1.5 * layer.weight.high[...]
    _assert_packed_to_the_bit(fcg.pack(layer))


def test_layers_that_quantize_by_themselves_are_packed_to_the_bit():
    _assert_packed_to_the_bit(fcg.pack(fcg.BitLinear(33, 17, rngs=nnx.Rngs(0))))
    for weight_scale in ("per_channel", "per_tensor"):
        layer = fcg.Int8Linear(33, 17, weight_scale=weight_scale, rngs=nnx.Rngs(0))
        _assert_packed_to_the_bit(fcg.pack(layer))


def _assert_packed_to_the_bit(packed):
    again = fcg.pack(fcg.unpack(packed))
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(again)), nnx.to_flat_state(nnx.state(packed)), strict=True
    ):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def test_in_half_precision_the_codes_stay():
    for make in (fcg.AbsMean, QUANTIZERS["percentile"], QUANTIZERS["affine"]):
        layer = fcg.QuantLinear(33, 17, weight=make(), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
        packed = fcg.pack(layer)
        again = fcg.pack(fcg.unpack(packed))
        np.testing.assert_array_equal(again.kernel.codes[...], packed.kernel.codes[...])
        np.testing.assert_allclose(
            np.float32(again.kernel[...]), np.float32(packed.kernel[...]), rtol=2**-7
        )


# Variables: types, metadata, sharing.


class Tagged(nnx.Param):
    pass


class Shared(nnx.Module):
    def __init__(self):
        metadata = {"out_sharding": ("in", "out"), "eager_sharding": False}
        make = lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0))  # noqa: E731
        self.first, self.second, self.alone = make(), make(), make()
        self.first.kernel = self.second.kernel = Tagged(self.first.kernel[...], **metadata)

    def __call__(self, x):
        return self.alone(self.second(self.first(x)))


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    "rule",
    [
        lambda layer: fcg.QuantLinear.from_layer(layer, weight=fcg.FakeQuant(4, axis=-1)),
        fcg.Int8Linear,
        fcg.NF4Linear,
    ],
    ids=["QuantLinear", "Int8Linear", "NF4Linear"],
)
def test_types_metadata_and_sharing_survive(rule, graph):
    model = fcg.convert(Shared(), rules={nnx.Linear: rule})
    with nnx.set_graph_mode(graph):
        if isinstance(model.first, fcg.NF4Linear):
            codes, apart = model.first.codes, model.alone.codes
            assert model.second.codes is codes
        else:
            packed = fcg.pack(model)
            codes, apart = packed.first.kernel.codes, packed.alone.kernel.codes
            assert packed.second.kernel.codes is codes
            unpacked = fcg.unpack(packed)
            assert type(unpacked.first.kernel) is Tagged
            assert unpacked.second.kernel is unpacked.first.kernel
            assert unpacked.alone.kernel is not unpacked.first.kernel
            assert unpacked.first.kernel.get_metadata("out_sharding") == ("in", "out")
            model = packed
        assert apart is not codes
        assert codes.get_metadata("out_sharding") == ("in", "out")
        report = fcg.size_report(model)
        arrays = jax.tree.leaves(nnx.split(model, graph=True)[1])
        assert report.nbytes == sum(a.nbytes for a in arrays)
