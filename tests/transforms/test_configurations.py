"""Estimators and layers in few bits under the configurations of JAX that refuse what they find.

A program that runs under all of them promotes nothing outside of the library's own operations and
computes no NaN on the way.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad import catalogue

NAMES = [
    "GumbelSoftmax",
    "VectorQuantizer",
    "ResidualVQ",
    "FSQ",
    "LFQ",
    "NMSparseLinear",
    "LSQ",
    "QuantConv",
    "NF4Linear",
    "QLoRALinear",
    "NVFP4Linear",
    "Int8Linear",
    "Fp8Linear",
]
ENTRIES = {entry.name: entry for entry in catalogue.entries() if entry.name in NAMES}
WITH_DTYPE = ["NMSparseLinear", "QuantConv", "NF4Linear", "NVFP4Linear", "Int8Linear"]


@contextlib.contextmanager
def refusing():
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
    ):
        yield


def example(name):
    """What the first example of an entry is called with, the layer first."""
    first, *_ = ENTRIES[name].examples.values()
    args = first(ENTRIES[name].module)
    return args if not isinstance(args[0], nnx.Module) else (lambda f, *x: f(*x), *args)


def gradients(call, layer, *inputs):
    def loss(layer, inputs):
        floats = [
            jnp.sum(jnp.square(y.astype(jnp.float32)))
            for y in jax.tree.leaves(call(layer, *inputs))
            if jnp.issubdtype(y.dtype, jnp.floating)
        ]
        return sum(floats)

    return jax.block_until_ready(nnx.grad(loss, argnums=(0, 1), allow_int=True)(layer, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_promotes_nothing_and_has_no_nan(name):
    call, *args = example(name)
    with refusing():
        gradients(call, *args)


@pytest.mark.parametrize("name", WITH_DTYPE)
def test_wide_parameters_of_a_layer_that_computes_in_half_precision(name):
    with jax.enable_x64(True):
        call, layer, *inputs = example(name)
        layer.dtype = jnp.bfloat16
        for variable in jax.tree.leaves(nnx.state(layer, nnx.Param), is_leaf=is_variable):
            variable.set_raw_value(variable.get_raw_value().astype(jnp.float64))
        found, _ = gradients(call, layer, *inputs)
        assert {a.dtype.name for a in jax.tree.leaves(found)} <= {"float64"}


def is_variable(leaf):
    return isinstance(leaf, nnx.Variable)


Z = np.random.default_rng(0).normal(size=(8, 3, 4)).astype(np.float32)
CODEBOOKS = {
    "dead codes": lambda rngs: fcg.VectorQuantizer(5, 4, learning="ema", dead_below=2, rngs=rngs),
    "cosine": lambda rngs: fcg.VectorQuantizer(5, 4, distance="cosine", rngs=rngs),
    "dropout": lambda rngs: fcg.ResidualVQ(2, 5, 4, quantizer_dropout=0.5, rngs=rngs),
}


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_codebook_of_padded_vectors_promotes_nothing_and_has_no_nan(name):
    layer, z = CODEBOOKS[name](nnx.Rngs(0)), jnp.asarray(Z, jnp.bfloat16)
    mask = jnp.asarray(np.arange(3) < np.arange(8)[:, None])
    with refusing():
        layer.initialize_codebook(z, iterations=2, mask=mask, rngs=nnx.Rngs(0))
        gradients(lambda layer, z: layer(z, mask=mask), layer, z)
        jax.block_until_ready(layer.indices_to_codes(layer(z).indices))


@pytest.mark.parametrize("layer", [fcg.FSQ((5, 4, 3, 2)), fcg.LFQ(4)])
def test_numbers_become_codes_where_nothing_is_promoted(layer):
    with refusing():
        jax.block_until_ready(layer.indices_to_codes(layer(jnp.asarray(Z)).indices))
