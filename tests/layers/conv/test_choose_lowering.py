"""The lowerings: each against XLA's own, which one is chosen, and where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_customgrad as fcg
from flax_customgrad.layers.conv import choose_lowering

SHAPES = {
    "patch": ((2, 7, 6, 3), {"features": 4, "window": (2, 2), "strides": 2}),
    "depthwise": ((3, 9, 8, 4), {"features": 8, "window": (3, 2), "groups": 4}),
    "depthwise, images in a loop": (
        (3, 48, 48, 32),
        {"features": 32, "window": (2, 3), "groups": 32},
    ),
    "depthwise, many taps": ((2, 9, 8, 4), {"features": 4, "window": (5, 4), "groups": 4}),
    "depthwise, strided": (
        (2, 9, 8, 4),
        {"features": 4, "window": (5, 6), "strides": 2, "groups": 4},
    ),
    "depthwise, two in": ((2, 9, 8, 8), {"features": 4, "window": (3, 2), "groups": 4}),
    "grouped": ((2, 5, 4, 12), {"features": 8, "window": (3, 3), "groups": 4}),
    "grouped, many": ((1, 4, 40), {"features": 360, "window": (3,), "groups": 20}),
    "transposed": ((2, 4, 3, 3), {"features": 2, "window": (3, 5), "spread": 2, "dilation": 3}),
    "dense": ((2, 8, 6, 3), {"features": 4, "window": (3, 2), "strides": 2, "dilation": 3}),
    "transposed, many phases": (
        (2, 3, 3, 2),
        {"features": 2, "window": (6, 6), "spread": 5},
    ),
    "xla": ((2, 6, 3), {"features": 4, "window": (3,), "strides": 2, "spread": 3}),
}


def made(shape, features, window, groups=1, strides=1, spread=1, dilation=1):
    layer = fcg.Conv(
        shape[-1],
        features,
        window,
        strides,
        padding=1,
        input_dilation=spread,
        kernel_dilation=dilation,
        feature_group_count=groups,
        rngs=nnx.Rngs(0),
    )
    return layer, jax.random.normal(jax.random.key(0), shape)


def value_and_gradients(layer, x):
    return nnx.value_and_grad(lambda m, x: jnp.sum(jnp.sin(m(x))), argnums=(0, 1))(layer, x)


@pytest.mark.parametrize("name", SHAPES)
def test_a_lowering_computes_what_xla_does(name):
    shape, kwargs = SHAPES[name]
    layer, x = made(shape, **kwargs)
    lowering = name.split(",")[0]
    geometry = layer._config(x, None).geometry
    assert choose_lowering.chosen_lowering(geometry) == lowering

    @jax.jit
    def of_each(layer, x):
        results = [value_and_gradients(layer, x)]
        for forced in (lowering, "xla"):
            with fcg.use_lowering(forced):
                results.append(value_and_gradients(layer, x))
        return results

    *ours, expected = map(jax.tree.leaves, of_each(layer, x))
    for got in ours:
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.smoke
def test_a_lowering_that_does_not_fit_is_xla():
    layer, x = made((2, 6, 3), 4, (3,))
    with fcg.use_lowering("depthwise"):
        assert choose_lowering.chosen_lowering(layer._config(x, None).geometry) == "xla"
    with pytest.raises(ValueError, match="there are patch, depthwise"):
        fcg.use_lowering("winograd")


def convolutions(program, platform):
    exported = jax.export.export(jax.jit(program[0]), platforms=[platform])(*program[1:])
    return exported.mlir_module().count("stablehlo.convolution")


def test_an_exported_program_chooses_where_it_is_lowered():
    layer, x = made((2, 6, 6, 4), 4, (3, 3), groups=4)
    graphdef, state = nnx.split(layer)
    program = (lambda state, x: nnx.merge(graphdef, state)(x), state, x)
    assert convolutions(program, "cpu") == 0
    assert convolutions(program, "cuda") == 1


@pytest.mark.parametrize(
    ("features", "window", "expected"),
    [(4, (3, 3), 1), (4, (2, 2), 0), (4, (4, 4), 4), (3, (4, 4), 1), (3, (7, 7), 4)],
)
def test_small_windows_that_overlap_have_no_phases(features, window, expected):
    """The gradient for the input of a strided convolution; windows of one element are products."""
    layer, x = made((2, 8, 8, features), 4, window, strides=2)
    graphdef, state = nnx.split(layer)

    def dx(state, x, g):
        return jax.vjp(lambda x: nnx.merge(graphdef, state)(x), x)[1](g)

    assert convolutions((dx, state, x, layer(x)), "cpu") == expected


@pytest.mark.parametrize(
    ("layer", "kwargs"),
    [
        (fcg.Conv, {"feature_group_count": 4}),
        (fcg.Conv, {"padding": "CIRCULAR"}),
        (fcg.ConvTranspose, {"strides": 2}),
    ],
    ids=["depthwise", "circular", "transposed"],
)
def test_a_gradient_is_exported_for_a_batch_of_any_size(layer, kwargs):
    graphdef, state = nnx.split(layer(4, 4, 3, **kwargs, rngs=nnx.Rngs(0)))

    def loss(state, x):
        return jnp.sum(nnx.merge(graphdef, state)(x) ** 2)

    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 5, 4), jnp.float32)
    exported = jax.export.export(jax.jit(jax.grad(loss, 1)))(state, x)
    x = jax.random.normal(jax.random.key(0), (3, 5, 4))
    np.testing.assert_allclose(exported.call(state, x), jax.grad(loss, 1)(state, x), atol=1e-5)


def test_the_gradient_of_a_dense_kernel_is_fast_in_a_loop():
    """XLA on a CPU has fast code for one layout, into which it brings no others in a loop."""
    layer, x = made((2, 6, 6, 4), 4, (3, 3))
    graphdef, state = nnx.split(layer)

    def loss(state, x):
        body = lambda x, _: (nnx.merge(graphdef, state)(x), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(body, x, length=2)[0])

    text = jax.jit(jax.grad(loss)).lower(state, x).compile().as_text()
    lines = [line for line in text.splitlines() if " convolution(" in line]
    assert lines
    assert all("dim_labels=b01f_01io->b01f" in line for line in lines)


@pytest.mark.parametrize("groups", [1, 8])
def test_memory_of_a_step_is_not_above_that_of_nnx(groups):
    def bytes_of(module):
        layer = module.Conv(8, 8, (3, 3), feature_group_count=groups, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(layer)
        loss = lambda s, x: jnp.sum(nnx.merge(graphdef, s)(x) ** 2)  # noqa: E731
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        compiled = step.lower(state, jnp.ones((8, 32, 32, 8))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    images = 8 * 34 * 34 * 8 * 4
    assert bytes_of(fcg) <= bytes_of(nnx) + 1.5 * images
