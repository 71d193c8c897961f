"""The products of attention on one CPU: what they take, and what few scores are computed by."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_customgrad as fcg


def layouts_of_factors(program):
    """The layouts of the factors of each product, in the text of a program of XLA."""
    layouts = dict(re.findall(r"%?([\w.-]+) = \w+\[[\d,]*\]\{([\d,]*)\}", program))
    for factors in re.findall(r" dot\(([^)]*)\)", program):
        yield from (layouts[name] for name in re.findall(r"%?([\w.-]+)(?:, |$)", factors))


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_what_a_product_takes_is_written_down(batch, monkeypatch):
    """Of what is transposed XLA has no product in half precision, and widens it."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    q = jax.ShapeDtypeStruct((*batch, 8, 4, 8), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((*batch, 8, 2, 16), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((*batch, 8, 2, 8), jnp.bfloat16)

    def loss(q, k, v):
        return jnp.sum(fcg.dot_product_attention(q, k, v))

    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).as_text("hlo")
    layouts = list(layouts_of_factors(program))
    assert len(layouts) == 14
    assert {",".join(sorted(layout.split(","), reverse=True)) for layout in layouts} == set(layouts)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(0, 8, 4, 8), (2, 0, 4, 8), (2, 8, 4, 0)], ids=str)
def test_empty_arguments(shape, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    q = jnp.ones(shape, jnp.bfloat16)
    y, pull = jax.vjp(fcg.dot_product_attention, q, q, q)
    assert y.shape == shape
    assert [d.shape for d in pull(y)] == [shape] * 3


@pytest.mark.smoke
def test_one_tile_alone_needs_no_running_maximum():
    """Its weights are a softmax, which XLA's library computes whole, from scores to weights."""
    q = jnp.ones((1, 8, 2, 4))

    def n_exponentials(**kwargs):
        program = jax.jit(lambda q: fcg.dot_product_attention(q, q, q, **kwargs)).lower(q)
        return program.as_text().count("stablehlo.exponential")

    assert n_exponentials() == 1
    assert n_exponentials(tile_size=4) == 2


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_tile_has_the_values_of_several(dtype):
    """With a query that sees no key, scores in the hundreds, and a value that is no number."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 8, 2, 4), dtype) for i in range(3))
    mask = jnp.ones((1, 1, 8, 8), bool).at[..., 3, :].set(False).at[..., 5].set(False)
    arguments = 300 * q, k, v.at[0, 2, 0, 0].set(jnp.nan).at[0, 5].set(1e30)

    def attention(*arguments, **kwargs):
        return fcg.dot_product_attention(*arguments, mask=mask, **kwargs)

    def differentiated(*arguments):
        return jax.vjp(attention, *arguments)[0]

    one, several = attention(*arguments), attention(*arguments, tile_size=4)
    assert (np.asarray(one[:, 3], np.float32)[1] == 0).all()
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    for y in (one, differentiated(*arguments)):
        np.testing.assert_allclose(
            np.asarray(y, np.float32), np.asarray(several, np.float32), tolerance, tolerance
        )
