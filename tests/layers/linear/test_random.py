"""Random configurations against autodiff of nnx in float64, where nothing can hide in rounding."""

import string

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import flax_customgrad as fcg

SETTINGS = settings(max_examples=6, deadline=None, derandomize=True)


def agree(make, shape):
    """Value and gradients of a layer of ours and of nnx, in float64 and in one program."""
    with jax.enable_x64(True):
        split = [nnx.split(make(module)) for module in (fcg, nnx)]
        x = jax.random.normal(jax.random.key(0), shape, jnp.float64)

        def loss(state, x, graphdef):
            y = nnx.merge(graphdef, state)(x)
            return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

        @jax.jit
        def both(states, x):
            return [
                jax.value_and_grad(loss, (0, 1))(state, x, graphdef)
                for (graphdef, _), state in zip(split, states, strict=True)
            ]

        ours, theirs = map(jax.tree.leaves, both([state for _, state in split], x))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@st.composite
def equations(draw):
    """An einsum equation: labels of x and the kernel, of which y keeps any, in any order."""
    labels = string.ascii_lowercase[:5]
    sizes = {c: draw(st.integers(1, 3)) for c in labels}
    x = draw(st.permutations(labels))[: draw(st.integers(1, 4))]
    kernel = draw(st.permutations(labels))[: draw(st.integers(2, 3))]
    present = sorted({*x, *kernel})
    y = draw(st.permutations(present))[: draw(st.integers(0, len(present)))]
    equation = f"{''.join(x)},{''.join(kernel)}->{''.join(y)}"
    return (
        equation,
        tuple(sizes[c] for c in x),
        tuple(sizes[c] for c in kernel),
        draw(st.booleans()),
    )


@SETTINGS
@given(equations())
def test_einsum(case):
    equation, shape, kernel, use_bias = case
    _, labels_and_y = equation.split(",")
    labels, y = labels_and_y.split("->")
    kept = [kernel[labels.index(c)] for c in y if c in labels]
    bias = tuple(kept) if use_bias and kept else None
    made = {"param_dtype": jnp.float64, "bias_init": nnx.initializers.normal()}
    agree(lambda m: m.Einsum(equation, kernel, bias, **made, rngs=nnx.Rngs(0)), shape)


@st.composite
def products(draw):
    """LinearGeneral: batch axes in front, any others contracted, counted from either end."""
    batch = draw(st.integers(0, 2))
    shape = draw(st.lists(st.integers(1, 3), min_size=batch + 1, max_size=batch + 3))
    others = draw(st.permutations(range(batch, len(shape))))
    axes = sorted(others[: draw(st.integers(1, len(others)))])
    negative = draw(st.booleans())
    return {
        "shape": tuple(shape),
        "in_features": tuple(shape[a] for a in axes),
        "out_features": tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))),
        "axis": tuple(a - len(shape) if negative else a for a in axes),
        "batch_axis": {a: shape[a] for a in range(batch)},
        "use_bias": draw(st.booleans()),
    }


@SETTINGS
@given(products())
def test_linear_general(case):
    shape = case.pop("shape")
    made = {"param_dtype": jnp.float64, "bias_init": nnx.initializers.normal()}
    agree(lambda m: m.LinearGeneral(**case, **made, rngs=nnx.Rngs(0)), shape)
