"""Stacked layers, made under nnx.vmap and run under nnx.scan: each is what it is by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.layers.stacked import unstack

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


@nnx.vmap
def _make(key):
    return nnx.Linear(4, 4, rngs=nnx.Rngs(key))


def _stack():
    return _make(jax.random.split(jax.random.key(0), 3))


@nnx.jit
@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def _run(x, layer):
    return layer(x)


@nnx.jit
def _run_each(x, layers):
    for layer in layers:
        x = layer(x)
    return x


RULES = {
    "FakeQuant": lambda layer: fcg.QuantLinear.from_layer(
        layer, weight=fcg.FakeQuant(4, axis=0, block=3, dynamic=False), activation=fcg.FakeQuant(8)
    ),
    "LSQ": lambda layer: fcg.QuantLinear.from_layer(
        layer, weight=fcg.LSQ(3, axis=-1), gradient=fcg.DoReFaGradient(4, rngs=nnx.Rngs(0))
    ),
    "BitLinear": lambda layer: fcg.BitLinear.from_layer(
        layer, norm=fcg.RMSNorm(4, rngs=nnx.Rngs(0))
    ),
    "Int8Linear": lambda layer: fcg.Int8Linear.from_layer(
        layer, backward="int8", stochastic_rounding=True, rngs=nnx.Rngs(0)
    ),
    "NVFP4Linear": fcg.NVFP4Linear.from_layer,
    "NF4Linear": fcg.NF4Linear.from_layer,
    "Int4Linear": lambda layer: fcg.Int4Linear.from_layer(layer, symmetric=False, train_bias=True),
    "QLoRALinear": lambda layer: fcg.QLoRALinear.from_layer(layer, lora_rank=2, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize(
    ("rule", "graph"), [(rule, i % 2 == 0) for i, rule in enumerate(RULES)], ids=list(RULES)
)
def test_each_layer_of_a_stack_is_converted_packed_and_dequantized_as_by_itself(rule, graph):
    with nnx.set_graph_mode(graph):
        stack = fcg.convert(_stack(), rules={nnx.Linear: RULES[rule]})
        each = [RULES[rule](layer) for layer in unstack(_stack(), (3,)).values()]
        expected = _run_each(X, each)
        np.testing.assert_allclose(_run(X, stack), expected, rtol=1e-5, atol=1e-6)
        sizes = [fcg.size_report(layer) for layer in each]
        report = fcg.size_report(stack)
        assert report.nbytes == sum(size.nbytes for size in sizes)
        assert report.unpacked_nbytes == sum(size.unpacked_nbytes for size in sizes)
        if hasattr(stack, "to_layer"):
            dequantized = _run(X, stack.to_layer())
            np.testing.assert_allclose(dequantized, expected, rtol=1e-5, atol=1e-5)
        if hasattr(stack, "pack_weights"):
            packed = fcg.pack(stack)
            np.testing.assert_allclose(_run(X, packed), expected, rtol=1e-5, atol=1e-6)
            sizes = [fcg.size_report(fcg.pack(layer)) for layer in each]
            assert fcg.size_report(packed).unpacked_nbytes == sum(s.unpacked_nbytes for s in sizes)
            unpacked = fcg.unpack(packed)
            assert unpacked.kernel.shape == (3, 4, 4)
            np.testing.assert_allclose(_run(X, unpacked), expected, rtol=1e-5, atol=1e-5)


def test_layers_of_a_stack_draw_noise_of_their_own():
    stack = RULES["LSQ"](_stack())
    keys = jax.random.key_data(stack.gradient.rngs.key[...])
    assert len(np.unique(keys, axis=0)) == 3


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("made", ["stacked", "converted"])
def test_each_layer_of_a_stack_has_a_history_of_its_own_in_fp8(made, graph):
    with nnx.set_graph_mode(graph):
        each = [
            fcg.Fp8Linear.from_layer(layer, history=3) for layer in unstack(_stack(), (3,)).values()
        ]
        if made == "converted":
            stack = fcg.Fp8Linear.from_layer(_stack(), history=3)
        else:
            make = nnx.vmap(lambda key: fcg.Fp8Linear(4, 4, history=3, rngs=nnx.Rngs(key)))
            stack = make(jax.random.split(jax.random.key(0), 3))
            fcg.reset_backward_state(stack)
        step = nnx.jit(nnx.grad(lambda stack, x: _run(x, stack).sum()))
        step_each = nnx.jit(nnx.grad(lambda layers, x: _run_each(x, layers).sum()))
        for x in (X, 2 * X):
            fcg.begin_step(stack)
            fcg.begin_step(each)
            grads, expected = step(stack, x), step_each(each, x)
        np.testing.assert_allclose(
            grads.kernel[...], jnp.stack([g.kernel[...] for g in expected]), rtol=1e-6
        )
        state = fcg.backward_state(stack)
        for i, layer in enumerate(each):
            np.testing.assert_array_equal(
                state["delayed"]["amax_history"][i], layer.delayed.amax_history[...]
            )
        fcg.load_backward_state(stack, state)
