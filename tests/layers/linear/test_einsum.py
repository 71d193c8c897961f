"""Equations of every kind: an ellipsis, batch labels, labels summed away, irregular ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.layers.linear.einsum import Equation

CASES = [
    ("nta,hab->nthb", (2, 3, 4), (2, 4), (5, 6, 3)),
    ("nta , hab -> nthb", (2, 3, 4), (2, 4), (5, 6, 3)),
    ("...a,ab->...b", (3, 4), 4, (3,)),
    ("...a,ab->...b", (3, 4), 4, (2, 5, 3)),
    ("...a,...ab->...b", (2, 3, 4), (2, 4), (2, 3)),
    ("...a,...ab->...b", (2, 3, 4), (2, 4), (5, 2, 3)),
    ("...a,ab->b", (3, 4), 4, (2, 3)),
    ("a...,a...->...", (3, 2), 2, (3, 5, 2)),
    ("bi,bio->bo", (5, 3, 4), (5, 4), (5, 3)),
    ("ab,cd->abcd", (2, 3), (2, 3), (4, 5)),
    ("ab,bc->ca", (3, 4), 4, (2, 3)),
    ("ab,c->ab", (4,), None, (2, 3)),
    ("abd,bc->ac", (3, 4), 4, (2, 3, 5)),
    ("ab,bcd->ac", (3, 4, 5), 4, (2, 3)),
    ("a,a->", (3,), None, (3,)),
    # Left to nnx: a repeated label, and axes of size 1 that broadcast.
    ("aab,bc->ac", (3, 4), 4, (2, 2, 3)),
    ("ab,bb->ab", (3, 3), None, (2, 3)),
    ("...a,...ab->...b", (2, 3, 4), (2, 4), (5, 1, 3)),
]


@pytest.mark.parametrize(("equation", "kernel", "bias", "shape"), CASES)
def test_any_equation(equation, kernel, bias, shape):
    made = {
        "kernel_init": nnx.initializers.normal(1.0),
        "bias_init": nnx.initializers.normal(1.0),
        "rngs": nnx.Rngs(0),
    }
    split = [nnx.split(m.Einsum(equation, kernel, bias, **made)) for m in (fcg, nnx)]
    state = split[0][1]

    @jax.jit
    def both(state, x):
        results = []
        for graphdef, _ in split:
            y, pull = jax.vjp(lambda s, x, g=graphdef: nnx.merge(g, s)(x), state, x)
            results.append((y, pull(jnp.cos(y))))
        return results

    ours, theirs = both(state, jax.random.normal(jax.random.key(0), shape))
    np.testing.assert_array_equal(ours[0], theirs[0])
    for got, expected in zip(*(jax.tree.leaves(r[1]) for r in (ours, theirs)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_the_equation_of_a_call():
    ours, theirs = (m.Einsum("ab,bc->ac", (3, 4), rngs=nnx.Rngs(0)) for m in (fcg, nnx))
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(ours(x, "ab,bc->ca"), theirs(x, "ab,bc->ca"))
    ours.einsum_str = None
    np.testing.assert_array_equal(ours(x, "ab,bc->ca"), theirs(x, "ab,bc->ca"))
    with pytest.raises(ValueError, match="No `einsum_str` argument"):
        ours(x)


def test_an_equation_that_does_not_fit():
    layer = fcg.Einsum("ab,bc->ac", (3, 4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="does not fit an input of rank 3 and a kernel of rank 2"):
        layer(jnp.ones((2, 2, 3)))


@pytest.mark.smoke
def test_parse():
    assert Equation.parse("...a,ab->...b", 3, 2) == Equation("cda", "ab", "cdb")
    assert Equation.parse("ab,bc->ac", 2, 2).bias_axes == (0,)
