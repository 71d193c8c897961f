"""Layers that multiply in few bits, or with few weights, are packed as they multiply."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

X = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)


@nnx.jit
def _forward(model, x):
    return model(x)


@nnx.jit
def _gradients(model, x):
    return nnx.grad(lambda model, x: (model(x) ** 2).sum(), argnums=(0, 1))(model, x)


def _linear(cls, **kwargs):
    return lambda n=40, **more: cls(n, n - 6, **kwargs, **more, rngs=nnx.Rngs(0))


LAYERS = {
    "MXFP8": _linear(fcg.MXLinear),
    "MXFP4 down": _linear(fcg.MXLinear, format="mxfp4", scale="down", block=16),
    "NVFP4": _linear(fcg.NVFP4Linear, stochastic_rounding=False),
    "fp8 current": _linear(fcg.Fp8Linear, scaling="current", margin=1),
    "fp8 delayed": _linear(fcg.Fp8Linear, history=3),
    "2:4": _linear(fcg.NMSparseLinear),
    "1:8": _linear(fcg.NMSparseLinear, n=1, m=8),
}
# A kernel of 40 x 34 and a bias, which is not packed: elements, scales, and a factor or masks.
BYTES = {
    "MXFP8": 40 * 34 + 2 * 34,
    "MXFP4 down": 40 * 17 + 3 * 34,
    "NVFP4": 40 * 17 + 3 * 3 + 4,
    "fp8 current": 40 * 34 + 4,
    "fp8 delayed": 40 * 34 + 12,
    "2:4": 20 * 34 * 4 + 40 * 5,
    "1:8": 5 * 34 * 4 + 40 * 5,
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_the_same_to_the_bit_and_so_is_what_is_packed_again(name):
    layer = LAYERS[name]()
    if name == "fp8 delayed":
        _gradients(layer, 3 * X)  # Scales that are not those of the beginning.
    packed = fcg.pack(layer)
    layer.eval()
    np.testing.assert_array_equal(_forward(packed, X), _forward(layer, X))
    report = fcg.size_report(packed)
    assert report.nbytes == BYTES[name] + 34 * 4
    assert report.unpacked_nbytes == (40 * 34 + 34) * 4
    assert [path for path, _ in nnx.to_flat_state(nnx.state(packed, nnx.Param))] == [("bias",)]
    with pytest.raises(ValueError, match="no layer of the model has a quantizer"):
        fcg.pack(packed)
    _assert_same_codes(fcg.pack(fcg.unpack(packed)), packed)
    # No gradient of the codes, and that of the input where both products see the same weights.
    if not name.startswith("MX"):
        (grads, dx), (expected, expected_dx) = (_gradients(m, X) for m in (packed, layer))
        np.testing.assert_array_equal(dx, expected_dx)
        np.testing.assert_array_equal(grads.bias[...], expected.bias[...])


def _assert_same_codes(got, expected):
    states = [nnx.to_flat_state(nnx.state(m, fcg.Packed)) for m in (got, expected)]
    for (path, a), (_, b) in zip(*states, strict=True):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


@pytest.mark.parametrize("name", ["MXFP8", "NVFP4", "fp8 current", "2:4"])
def test_half_precision_and_a_computation_in_it(name):
    for dtypes in ({"param_dtype": jnp.bfloat16}, {"dtype": jnp.float16}):
        layer = LAYERS[name](**dtypes)
        packed = fcg.pack(layer)
        layer.eval()
        x = X.astype(jnp.float16)
        np.testing.assert_array_equal(_forward(packed, x), _forward(layer, x))
        unpacked = fcg.unpack(packed)
        assert unpacked.kernel.dtype == layer.kernel.dtype
        codes = fcg.pack(unpacked).kernel.codes[...]
        np.testing.assert_array_equal(codes, packed.kernel.codes[...])


def test_scales_that_are_small_or_not_met_by_the_values_are_packed_again_to_the_bit():
    w = np.random.default_rng(1).normal(size=(64, 48)).astype(np.float32)
    w *= np.exp2(np.random.default_rng(2).integers(-24, 2, size=(64, 48)))
    w[::7] = 0
    for make in (LAYERS["MXFP8"], LAYERS["MXFP4 down"], LAYERS["NVFP4"], LAYERS["fp8 current"]):
        layer = make(54)
        layer.kernel.set_value(jnp.asarray(w))
        packed = fcg.pack(layer)
        _assert_same_codes(fcg.pack(fcg.unpack(packed)), packed)


@nnx.vmap
def _make(key):
    return nnx.Linear(4, 4, rngs=nnx.Rngs(key))


@nnx.jit
@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def _run(x, layer):
    return layer(x)


@pytest.mark.parametrize(
    ("rule", "graph"),
    [
        (fcg.MXLinear.from_layer, True),
        (fcg.NVFP4Linear.from_layer, False),
        (lambda layer: fcg.Fp8Linear.from_layer(layer, history=2), True),
        (fcg.NMSparseLinear.from_layer, False),
    ],
    ids=["MXLinear", "NVFP4Linear", "Fp8Linear", "NMSparseLinear"],
)
def test_each_layer_of_a_stack_is_packed_as_by_itself(rule, graph):
    with nnx.set_graph_mode(graph):
        stack = rule(_make(jax.random.split(jax.random.key(0), 3)))
        if isinstance(stack, fcg.Fp8Linear):
            nnx.jit(nnx.grad(lambda stack, x: _run(x, stack).sum()))(stack, X[:, :4])
            amax = fcg.backward_state(stack)["delayed"]["amax_history"]
            assert len(np.unique(amax[:, 1, 0])) == 3
        packed = fcg.pack(stack)
        stack.eval()
        np.testing.assert_array_equal(_run(X[:, :4], packed), _run(X[:, :4], stack))
        unpacked = fcg.unpack(packed)
        assert unpacked.kernel.shape == (3, 4, 4)
        _assert_same_codes(fcg.pack(unpacked), packed)


class Model(nnx.Module):
    """Layers of each kind, two of which share a kernel."""

    def __init__(self, rngs):
        self.layers = nnx.List([make() for make in LAYERS.values()])
        self.einsum = fcg.Fp8Einsum("ni,io->no", (40, 3), scaling="current", rngs=rngs)
        self.shared = fcg.MXLinear(40, 34, use_bias=False, rngs=rngs)
        self.shared.kernel = self.layers[0].kernel
        for layer in self.layers:
            layer.kernel.set_value(rngs.normal((40, 34)) / 6)

    def __call__(self, x):
        return sum(layer(x) for layer in self.layers) + self.shared(x) + self.einsum(x).sum()


def test_a_fresh_process_restores_what_was_packed_and_what_is_shared_stays_so():
    packed = fcg.pack(Model(nnx.Rngs(0)))
    assert packed.shared.kernel.codes is packed.layers[0].kernel.codes
    unpacked = fcg.unpack(packed)
    assert unpacked.shared.kernel is unpacked.layers[0].kernel
    saved = flax.serialization.to_bytes(nnx.to_pure_dict(nnx.state(packed)))
    expected = _forward(packed, X)
    for fresh in (
        fcg.pack(Model(nnx.Rngs(1))),
        nnx.eval_shape(lambda: fcg.pack(Model(nnx.Rngs(1)))),
    ):
        graphdef, state = nnx.split(fresh)
        pure = nnx.to_pure_dict(nnx.state(packed))
        nnx.replace_by_pure_dict(state, flax.serialization.from_bytes(pure, saved))
        np.testing.assert_array_equal(_forward(nnx.merge(graphdef, state), X), expected)


def test_sparse_layers_are_packed_whole_or_not_at_all():
    layer = LAYERS["2:4"]()
    layer.kernel[:4, 0] = 0.0
    layer.kernel[4:8, 0] = jnp.array([0.0, -0.0, 1.0, 0.0])
    packed = fcg.pack(layer)
    np.testing.assert_array_equal(packed.sparse_kernel, layer.sparse_kernel)
    packed.dot_general = lambda *args, **kwargs: 2 * jax.lax.dot_general(*args, **kwargs)
    np.testing.assert_allclose(packed(X), 2 * layer(X), rtol=1e-5)
    layer.kernel[8:12, 1] = jnp.array([jnp.nan, 2.0, jnp.nan, jnp.nan])
    with pytest.raises(ValueError, match="NMSparseLinear: its kernel has NaN, which is kept"):
        fcg.pack(layer)
