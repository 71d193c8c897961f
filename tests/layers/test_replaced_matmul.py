"""`from_layer` of every layer that replaces a product: all or nothing."""

import jax
import pytest
from flax import nnx

import flax_customgrad as fcg

# A class and arguments that it refuses, some of them only while they are set.
REFUSED = {
    "QuantLinear, weight": (fcg.QuantLinear, {"weight": 3}),
    "QuantLinear, gradient": (fcg.QuantLinear, {"weight": fcg.FakeQuant(4), "gradient": 3}),
    "BitLinear, norm": (fcg.BitLinear, {"norm": 3}),
    "BinaryLinear, residuals": (fcg.BinaryLinear, {"residuals": "none"}),
    "Int8Linear": (fcg.Int8Linear, {"backward": "int4"}),
    "Fp8Linear": (fcg.Fp8Linear, {"history": 0}),
    "MXLinear": (fcg.MXLinear, {"block": 0}),
    "NVFP4Linear": (fcg.NVFP4Linear, {"residuals": "none"}),
    "NMSparseLinear": (fcg.NMSparseLinear, {"n": 5, "m": 4}),
    "FeedbackLinear": (fcg.FeedbackLinear, {"rngs": 3}),
    "LoRALinear": (fcg.LoRALinear, {"lora_rank": "two", "rngs": nnx.Rngs(0)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_is_refused_stays_what_it_was(name):
    cls, arguments = REFUSED[name]
    layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    kernel, held = layer.kernel, set(vars(layer))
    with pytest.raises((TypeError, ValueError, AttributeError)):
        cls.from_layer(layer, **arguments)
    assert type(layer) is nnx.Linear
    assert (layer.kernel, set(vars(layer))) == (kernel, held)
    assert len(jax.tree.leaves(nnx.state(layer))) == 2
