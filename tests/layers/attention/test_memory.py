"""What attention keeps, and that no array of all scores exists."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import flax_customgrad as fcg


def shapes_in(jaxpr):
    """The sizes of all arrays in a program, also in those that it calls."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.size
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                yield from shapes_in(getattr(value, "jaxpr", value))


def is_program(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def attention(q, k, v, **kwargs):
    return fcg.dot_product_attention(q, k, v, is_causal=True, **kwargs)


@pytest.mark.smoke
def test_it_keeps_its_arguments_its_output_and_two_numbers_per_query():
    q = jnp.ones((2, 64, 4, 8), jnp.bfloat16)
    kept = fcg.residual_bytes(attention, q, q + 1, q + 2)  # beside its arguments
    assert kept == q.nbytes + 2 * (2 * 64 * 4) * 4
    with fcg.use_autodiff():
        assert fcg.residual_bytes(attention, q, q + 1, q + 2) > 4 * kept


@pytest.mark.smoke
@pytest.mark.parametrize("length", [1024, 4096])
def test_no_array_of_all_scores_exists(length):
    q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    key = jax.random.key(0)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, dropout_rng=key, dropout_rate=0.1))

    text = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, q, q)
    largest = max(shapes_in(text.jaxpr))
    assert largest <= max(2 * 256 * 256 * 2, 2 * length * 16)


def test_eight_layers_in_a_scan_take_a_sixth_of_the_memory():
    """It keeps 5 arrays of the size of x for each layer; nnx an array of all weights, and more."""
    x = jax.ShapeDtypeStruct((1, 512, 32), jnp.float32)

    def memory(library):
        def make(rngs):
            return library.MultiHeadAttention(4, 32, decode=False, rngs=rngs)

        graphdef, state = nnx.split(nnx.vmap(make)(nnx.Rngs(0).split(8)))

        def loss(state, x):
            def layer(x, state):
                return nnx.merge(graphdef, state)(x, is_causal=True), None

            return jnp.sum(jax.lax.scan(layer, x, state)[0] ** 2)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(state, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(fcg) < memory(nnx) / 6
