"""Layers whose sums, blocks and gains depend on the number of rows, exported for any number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg


def _with_lsq(rngs):
    layer = fcg.QuantLinear(4, 3, activation=fcg.LSQ(4, axis=-1), rngs=rngs)
    layer.activation.observe(jnp.ones((2, 4)))
    return layer


LAYERS = {
    "VectorQuantizer": lambda rngs: fcg.VectorQuantizer(16, 4, rngs=rngs),
    "MXLinear": lambda rngs: fcg.MXLinear(4, 3, block=3, rngs=rngs),
    "Int8Linear": lambda rngs: fcg.Int8Linear(4, 3, backward="int8", rngs=rngs),
    "LSQ": _with_lsq,
    "Fp8Linear, packed": lambda rngs: fcg.pack(fcg.Fp8Linear(4, 3, rngs=rngs)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_value_and_gradient_are_exported_with_a_symbolic_batch(name):
    graphdef, state = nnx.split(LAYERS[name](nnx.Rngs(0)))

    def loss(state, x):
        leaves = jax.tree.leaves(nnx.merge(graphdef, state)(x))
        return sum(jnp.sum(jnp.square(a)) for a in leaves if jnp.issubdtype(a.dtype, jnp.floating))

    program = jax.jit(jax.value_and_grad(loss, argnums=1))
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 4"), jnp.float32)
    exported = jax.export.export(program)(state, batch)
    x = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    for found, expected in zip(exported.call(state, x), program(state, x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
