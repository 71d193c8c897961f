"""`wait_for`: a backward that decodes again holds the codes, and not their floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.contract.ordering import wait_for

N, ROWS, FEATURES = 8, 256, 128
FLOAT = 4 * ROWS * FEATURES


def w8a8(rngs):
    quantizers = {"weight": fcg.FakeQuant(8, axis=-1), "activation": fcg.FakeQuant(8)}
    return fcg.QuantLinear(FEATURES, FEATURES, **quantizers, rngs=rngs)


# Arrays of floats of the size of an input that eight layers keep; in float32 it is one a layer.
LAYERS = {
    "W8A8": (w8a8, 4.5),
    "Int8": (lambda rngs: fcg.Int8Linear(FEATURES, FEATURES, rngs=rngs), 4.5),
    "fp8": (lambda rngs: fcg.Fp8Linear(FEATURES, FEATURES, rngs=rngs), 4.5),
    "MX": (lambda rngs: fcg.MXLinear(FEATURES, FEATURES, rngs=rngs), 5),
    "binary": (lambda rngs: fcg.BinaryLinear(FEATURES, FEATURES, rngs=rngs), 5),
}


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="before, XLA takes barriers out before it orders"
)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_one_after_the_other_hold_codes(name):
    make, most = LAYERS[name]
    graphdef, params, others = nnx.split(
        nnx.List([make(nnx.Rngs(i)) for i in range(N)]), nnx.Param, ...
    )

    def loss(params, x):
        for layer in nnx.merge(graphdef, params, others):
            x = layer(x)
        return jnp.sum(x**2)

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    memory = step.lower(params, jnp.ones((ROWS, FEATURES))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < most * FLOAT


def test_the_transpose_of_a_surrogate_does_not_wait():
    """Forward mode is the transpose of the backward, in which what waits would be linear."""
    quantizer = fcg.LSQ(3)
    graphdef, params = nnx.split(quantizer)

    def function(params, x):
        return nnx.merge(graphdef, params)(x)

    x = jnp.array([0.3, -2.0, 0.7])
    args, tangents = (params, x), (jax.tree.map(jnp.ones_like, params), jnp.ones_like(x))
    _, tangent = jax.jit(lambda *args: jax.jvp(function, args, tangents))(*args)
    gradient = jax.jit(jax.grad(lambda *args: function(*args).sum(), argnums=(0, 1)))(*args)
    total = sum(map(jnp.sum, jax.tree.leaves(gradient)))
    np.testing.assert_allclose(tangent.sum(), total, rtol=1e-6)


def test_it_changes_nothing_else():
    def function(g, x):
        g, (a, b) = wait_for(g, (x, 2 * x))
        return jnp.sum(g * a * b)

    g, x = jnp.arange(3.0), jnp.array([1.0, -2.0, 3.0])
    value, gradient = jax.jit(jax.value_and_grad(function, argnums=1))(g, x)
    np.testing.assert_allclose(value, jnp.sum(2 * g * x**2))
    np.testing.assert_allclose(gradient, 4 * g * x)
    assert wait_for(g, x) == (g, x)  # outside of a trace
    np.testing.assert_allclose(
        jax.vmap(lambda g: wait_for(g, x)[1], out_axes=None)(jnp.ones((2, 3))), x
    )
