"""Sizes of layers that flax.nnx does not have: NumPy's and JAX's integers count, and no others."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg

MAKE = {
    "VectorQuantizer": lambda n: fcg.VectorQuantizer(n, n, rngs=nnx.Rngs(0)),
    "SimVQ": lambda n: fcg.SimVQ(n, n, rngs=nnx.Rngs(0)),
    "ResidualVQ": lambda n: fcg.ResidualVQ(n, n, n, rngs=nnx.Rngs(0)),
    "LFQ": lambda n: fcg.LFQ(n),
    "FSQ": lambda n: fcg.FSQ([n, n]),
    "TopKST": lambda n: fcg.TopKST(n),
    "FakeQuant": lambda n: fcg.FakeQuant(n, axis=n, block=n),
    "LSQ": lambda n: fcg.LSQ(n, features=n),
    "NF4Linear": lambda n: fcg.NF4Linear(8, 2, block=n, rngs=nnx.Rngs(0)),
    "Int4Linear": lambda n: fcg.Int4Linear(8, 2, block=n, rngs=nnx.Rngs(0)),
    "QLoRALinear": lambda n: fcg.QLoRALinear(8, 2, lora_rank=n, block=n, rngs=nnx.Rngs(0)),
    "Fp8Linear": lambda n: fcg.Fp8Linear(8, 2, history=n, margin=n, rngs=nnx.Rngs(0)),
    "LRU": lambda n: fcg.LRU(n, n, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", MAKE)
def test_integers_of_numpy_and_jax_are_those_of_python(name):
    of_python = _integers(MAKE[name](4))
    assert of_python
    assert _integers(MAKE[name](np.int64(4))) == of_python
    assert _integers(MAKE[name](jnp.int32(4))) == of_python


def _integers(layer):
    """What a layer holds that is an integer of Python, or a tuple of them."""
    held = {}
    for path, part in nnx.iter_modules(layer):
        for name, value in vars(part).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if numbers and all(type(number) is int for number in numbers):
                held[*path, name] = value
    return held


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
@pytest.mark.parametrize("name", [name for name in MAKE if name != "FakeQuant"])
def test_other_sizes_are_refused(name, size):
    with pytest.raises(ValueError, match=r"must be (an integer|integers|of)"):
        MAKE[name](size)


def test_a_word_is_no_axis():
    with pytest.raises(ValueError, match=r"FakeQuant: axis='channel' is none of 'token'"):
        fcg.FakeQuant(8, axis="channel")


def test_k_may_be_of_numpy():
    logits = jnp.array([1.0, 3.0, 2.0])
    np.testing.assert_array_equal(fcg.top_k_st(logits, k=np.int64(2)), [0, 1, 1])


def test_true_is_no_number():
    with pytest.raises(ValueError, match=r"margin=True must be an integer from 0 to 15"):
        fcg.Fp8Linear(8, 2, margin=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"strides=True; write an int of at least 1"):
        fcg.Conv(2, 2, (3, 3), strides=True, rngs=nnx.Rngs(0))(jnp.ones((4, 4, 2)))
