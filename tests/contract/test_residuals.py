"""What is counted as kept."""

import jax
import jax.numpy as jnp
from flax import nnx

import flax_customgrad as fcg


def test_arguments_are_told_apart_and_counted_once():
    x = jnp.ones((4, 8))
    found = fcg.residuals(lambda x: jnp.sum(x * x), x)
    assert [(r.shape, r.dtype, r.nbytes, r.is_argument) for r in found] == [
        ((4, 8), jnp.float32, 128, True)
    ]
    assert fcg.residual_bytes(lambda x: jnp.sum(x * x), x) == 0


def test_an_intermediate_is_counted():
    x = jnp.ones((4, 8), jnp.bfloat16)
    assert fcg.residual_bytes(lambda x: jnp.sum(jnp.exp(x)), x) == 64


def test_trees_and_shapes_without_arrays():
    spec = {"a": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    assert fcg.residual_bytes(lambda p: jnp.sum(jnp.exp(p["a"])), spec) == 128


def test_a_model_with_and_without_its_hand_written_backwards():
    def kept(model):
        graphdef, params = nnx.split(model)
        x = jnp.ones((16, 8), jnp.bfloat16)
        return fcg.residual_bytes(lambda p, x: nnx.merge(graphdef, p)(x), params, x)

    plain = nnx.Linear(8, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert kept(plain) == 8 * 8 * 2  # a copy of the kernel in bfloat16
    assert kept(fcg.convert(plain)) == 0
